"""How good a bundle is, on images whose coordinates are known."""
