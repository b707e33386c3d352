"""Index bundles: immutable directories that hold everything one index version answers with.

| file | what it is |
|---|---|
| ``manifest.json`` | the `Manifest`; written last, so that a directory with one is whole |
| ``level-<l>.faiss`` | composites of each level |
| ``cells.lmdb/data.mdb`` | the tree of cells |
| ``encoder/`` | configuration and weights, unless the index answers embeddings only |
| ``golden/`` | pictures whose embeddings the manifest records |
| ``gallery/`` | reference embeddings and their coordinates by leaf, where the bundle has any |

`open_bundle` is cheap and finds what is missing, cut short or of another schema. `verifying.verify_bundle` reads every
byte and asks the golden queries of `golden`. A bundle is data only: nothing in it is ever executed or unpickled.
"""

from geosurge.bundle.opening import Bundle, open_bundle, read_manifest
from geosurge.bundle.sealing import finish_bundle

__all__ = ["Bundle", "finish_bundle", "open_bundle", "read_manifest"]
