"""The server is killed while it activates versions; whatever starts next serves one of them, whole."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import grpc
import pytest
from support.answers import expected_answers, questions, same_answer
from support.bundles import make_store, tiny_encoder
from support.processes import ServerProcess, geolocation, index_client, server_process
from support.servers import embedding, encoded_image

from geosurge import store as stores
from geosurge.errors import GeoSurgeError

ROUNDS = 10
QUERIES = [encoded_image(0), embedding(0), encoded_image(1), embedding(1)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "store", dict.fromkeys(("a", "b"), tiny_encoder()))


class Administrator(threading.Thread):
    """Activates versions back and forth, loading each anew now and then, until the server is gone."""

    def __init__(self, server: ServerProcess, active: str, seed: int) -> None:
        super().__init__()
        self._server = server
        self._rng = random.Random(seed)
        self.possible = {active}
        """What the next server may serve: what was last acknowledged, or what was asked for then."""
        self.activations = 0
        self.end: GeoSurgeError | None = None

    def run(self) -> None:
        (active,) = self.possible
        with index_client(self._server) as index:
            try:
                while True:
                    before, active = active, "b" if active == "a" else "a"
                    self.possible = {before, active}
                    index.activate(active)
                    self.possible = {active}
                    self.activations += 1
                    if self._rng.random() < 0.5:
                        index.unload(before)
            except GeoSurgeError as error:
                self.end = error


def test_a_server_that_is_killed_while_it_activates_leaves_a_version_that_the_next_one_serves(
    store: Path, tmp_path: Path
) -> None:
    expected = {name: expected_answers(store / name, QUERIES) for name in ("a", "b")}
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    rng = random.Random(0)
    possible, activations = {"a"}, 0
    for number in range(ROUNDS):
        with server_process(store, scratch=scratch) as server:
            with grpc.insecure_channel(server.address) as channel:
                answers = [geolocation(channel).Locate(asked, timeout=60) for asked in questions(QUERIES)]
            (active,) = {answer.index_version for answer in answers}
            assert active in possible
            assert active == stores.current(store)
            assert all(map(same_answer, answers, expected[active]))
            assert list(scratch.iterdir()) == [], "what a killed server was loading is left"
            administrator = Administrator(server, active, number)
            administrator.start()
            time.sleep(rng.uniform(0.0, 0.5))
            server.process.kill()
            administrator.join()
            assert administrator.end is not None
            assert administrator.end.grpc_code == "UNAVAILABLE"
            possible = administrator.possible
            activations += administrator.activations
        assert all(entry.problem is None for entry in stores.list_bundles(store))
    assert activations > ROUNDS
