from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import grpc
from support.answers import question
from support.servers import embedding

from geosurge.v1 import geolocation_pb2_grpc


def test_a_signal_stops_the_process_gracefully(bundle: Path) -> None:
    program = """
        import sys
        from geosurge.server.process import serve
        from geosurge.settings import load_settings
        serve(load_settings(index=sys.argv[1], port=0), on_ready=lambda server: print(server.address, flush=True))
        print("stopped", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(bundle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            with grpc.insecure_channel(address) as channel:
                stub: Any = geolocation_pb2_grpc.GeolocationServiceStub(channel)
                assert stub.Locate(question(embedding(0)), timeout=30).index_version == "tiny"
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert output == "stopped\n"
    assert "stopping signal=SIGINT" in errors
    assert "code=OK" in errors
    assert "Traceback" not in errors


def test_a_signal_while_starting_ends_the_start(bundle: Path) -> None:
    program = """
        import os, signal, sys, threading
        from geosurge.locator import Locator
        from geosurge.server.process import serve
        from geosurge.settings import load_settings

        opened = Locator.assemble

        def open_slowly(*arguments, **keywords):
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(0.5)
            return opened(*arguments, **keywords)

        Locator.assemble = open_slowly
        serve(load_settings(index=sys.argv[1], port=0), on_ready=lambda server: print("ready", flush=True))
        print("stopped", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(bundle)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "stopped\n"
    assert "before the start was over signal=SIGTERM" in run.stderr
    assert " serving address" not in run.stderr
    assert "Traceback" not in run.stderr
