"""Generates engine/geosurge/v1 from proto/geosurge/v1: ``python proto/generate.py [OUTPUT_DIRECTORY]``."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

from google.rpc import status_pb2
from grpc_tools import protoc

PROTO_ROOT = Path(__file__).resolve().parent
DEFAULT_OUTPUT = PROTO_ROOT.parent / "engine"


def generate(output_root: Path) -> None:
    """Writes messages, type stubs and service stubs below ``output_root``/geosurge/v1.

    Args:
        output_root: Directory that holds (or will hold) the ``geosurge`` package.

    Raises:
        RuntimeError: The protocol compiler refused a file; its own message is on stderr.
    """
    (output_root / "geosurge" / "v1").mkdir(parents=True, exist_ok=True)
    well_known = resources.files("grpc_tools") / "_proto"
    googleapis = Path(status_pb2.__file__).parents[2]
    sources = sorted(str(path.relative_to(PROTO_ROOT)) for path in PROTO_ROOT.glob("geosurge/v1/*.proto"))
    status = protoc.main(
        [
            "protoc",
            f"-I{PROTO_ROOT}",
            f"-I{well_known}",
            f"-I{googleapis}",
            f"--python_out={output_root}",
            f"--pyi_out={output_root}",
            f"--grpc_python_out={output_root}",
            *sources,
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc failed with status {status} on {', '.join(sources)}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_OUTPUT)
