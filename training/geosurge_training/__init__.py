"""Trains GeoSURGE encoders and geocell embeddings, and builds index bundles from them."""
