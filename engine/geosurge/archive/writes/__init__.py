"""Positions written into sidecars and pictures, and taken back.

| file | knows |
|---|---|
| `file_write` | one write into one file: prepared with a backup, applied, undone |
| `journal` | the ledger's table of writes, which is on the disk before a file is touched |
| `run_writes` | the writes of a whole run: what is to be written, finished after a crash, taken back |

What the bytes of a file become is the matter of `geosurge.archive.metadata`.
"""
