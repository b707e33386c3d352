"""The Python client: paths, bytes, arrays or embeddings in, dataclasses out.

    with Client("127.0.0.1:50051") as client:
        location = client.locate("view.jpg")
        for answer in client.locate_many(Path("views").glob("*.jpg")):
            ...

`Client` blocks, `AsyncClient` is awaited; they have the same methods. A failed call raises the class of
`geosurge.errors` that the server meant. A call is repeated only when the server was unreachable or stopping
(UNAVAILABLE, or CANCELLED by it), with growing pauses, and never beyond its timeout: all calls only read, so repeating
one is harmless.
`IndexClient` is for administrators: it loads and activates index versions, and repeats nothing.
What a `Connection` says about TLS and tokens goes for every call.

Importing this package loads neither torch nor FAISS.
"""

from geosurge.client.asynchronous import AsyncClient
from geosurge.client.attempts import DEFAULT_TIMEOUT_SECONDS, RetryPolicy
from geosurge.client.blocking import Client
from geosurge.client.connection import Connection
from geosurge.client.index import IndexClient
from geosurge.client.requests import ImageSource, Query

__all__ = [
    "DEFAULT_TIMEOUT_SECONDS",
    "AsyncClient",
    "Client",
    "Connection",
    "ImageSource",
    "IndexClient",
    "Query",
    "RetryPolicy",
]
