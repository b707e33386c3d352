from __future__ import annotations

import fcntl
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support import power_cuts
from support.bundles import make_bundle, tiny_encoder

from geosurge import store as stores
from geosurge.bundle import finish_bundle, open_bundle, read_manifest
from geosurge.bundle.verifying import verify_bundle
from geosurge.errors import (
    BundleCorruptError,
    BundleInconsistentError,
    BundleNotFoundError,
    BundlePartialError,
    BundleSchemaError,
    StoreError,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    bundles = {name: make_bundle(folder / name, seed=seed, name=name) for seed, name in enumerate(("a", "b", "c"))}
    bundles["full"] = make_bundle(folder / "full", seed=7, name="full", encoder=tiny_encoder())
    return bundles


@pytest.fixture
def store(sources: dict[str, Path], tmp_path: Path) -> Path:
    """A store with the bundles a and b, of which a is active."""
    path = tmp_path / "store"
    stores.publish(path, sources["a"], activate=True)
    stores.publish(path, sources["b"])
    return path


def active_bundle(store: Path) -> str:
    return open_bundle(stores.resolve_bundle(store)).manifest.name


def test_published_bundles_are_listed_and_open(store: Path, sources: dict[str, Path]) -> None:
    entries = stores.list_bundles(store)
    assert [(entry.name, entry.active, entry.problem) for entry in entries] == [("a", True, None), ("b", False, None)]
    assert [entry.path for entry in entries] == [store / "a", store / "b"]
    assert entries[0].create_time == read_manifest(sources["a"]).create_time
    assert stores.current(store) == "a"
    assert stores.resolve_bundle(store) == store / "a"
    assert stores.resolve_bundle(store / "b") == store / "b"
    for name in ("a", "b"):
        assert verify_bundle(store / name).ok


def test_a_copy_equals_its_source_file_by_file(store: Path, sources: dict[str, Path]) -> None:
    def content(path: Path) -> dict[str, bytes]:
        return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}

    assert content(store / "a") == content(sources["a"])
    assert {path.name for path in store.iterdir()} <= {"a", "b", "CURRENT", ".publish.lock", ".activate.lock"}
    assert (store / "CURRENT").read_text() == "a\n"


def test_only_listed_files_are_copied(sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["a"], tmp_path / "source")
    (source / "notes.pkl").write_bytes(b"\x80\x04N.")
    stores.publish(tmp_path / "store", source)
    assert not (tmp_path / "store" / "a" / "notes.pkl").exists()


def test_a_bundle_published_under_another_name_takes_it(store: Path, sources: dict[str, Path]) -> None:
    assert stores.publish(store, sources["c"], name="2025-03.world_1") == "2025-03.world_1"
    assert read_manifest(store / "2025-03.world_1").name == "2025-03.world_1"
    assert read_manifest(store / "2025-03.world_1").files == read_manifest(sources["c"]).files
    assert verify_bundle(store / "2025-03.world_1").ok
    stores.activate(store, "2025-03.world_1")
    assert active_bundle(store) == "2025-03.world_1"


def test_a_taken_name_is_refused_and_the_same_bundle_is_published_once(store: Path, sources: dict[str, Path]) -> None:
    with pytest.raises(StoreError, match=r"a exists already; .* choose another name"):
        stores.publish(store, sources["c"], name="a")
    assert read_manifest(store / "a") == read_manifest(sources["a"])
    assert stores.publish(store, sources["a"]) == "a"
    stores.publish(store, sources["c"], name="d")
    assert stores.publish(store, sources["c"], name="d", activate=True) == "d"
    assert active_bundle(store) == "d"
    (store / "stray").mkdir()
    with pytest.raises(StoreError, match="stray exists already"):
        stores.publish(store, sources["c"], name="stray")


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-x", "a/b", "../a", "a b", "a\n", "é", "CURRENT", "HISTORY", "current", "/tmp"]
)
def test_names_that_are_no_names_are_refused(store: Path, sources: dict[str, Path], name: str) -> None:
    with pytest.raises(StoreError, match="name"):
        stores.publish(store, sources["c"], name=name)
    with pytest.raises(StoreError, match="name"):
        stores.activate(store, name)
    assert stores.current(store) == "a"


def test_activating_and_going_back(store: Path, sources: dict[str, Path]) -> None:
    stores.publish(store, sources["c"])
    for name in ("b", "c", "c", "b"):
        stores.activate(store, name)
        assert active_bundle(store) == name
    assert [stores.rollback(store) for _ in range(3)] == ["c", "b", "a"]
    assert active_bundle(store) == "a"
    with pytest.raises(StoreError, match=r"no bundle of .* was active before 'a'"):
        stores.rollback(store)
    assert active_bundle(store) == "a"


def test_the_history_ends_and_names_each_bundle_once(store: Path) -> None:
    for _ in range(60):
        stores.activate(store, "b")
        stores.activate(store, "a")
    assert (store / "HISTORY").read_text().splitlines() == ["a", "b"] * 50
    assert stores.history(store) == ["b", "a"]


def test_a_stuck_holder_of_the_pointer_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_ACTIVATE_LOCK_SECONDS", 0.05)
    with (store / ".activate.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=r"another process has held .*\.activate\.lock"):
            stores.activate(store, "b")
        with pytest.raises(StoreError, match="another process"):
            stores.rollback(store)
    assert stores.current(store) == "a"
    stores.activate(store, "b")


def test_a_name_that_no_file_system_takes_is_refused(store: Path, sources: dict[str, Path]) -> None:
    with pytest.raises(BundleNotFoundError, match="has no bundle"):
        stores.bundle_path(store, "a" * 300)
    with pytest.raises(StoreError, match="at most 200"):
        stores.publish(store, sources["c"], name="a" * 201)
    assert stores.publish(store, sources["c"], name="a" * 200) == "a" * 200


def test_going_back_skips_what_cannot_be_opened(store: Path, sources: dict[str, Path]) -> None:
    stores.publish(store, sources["c"])
    stores.activate(store, "b")
    stores.activate(store, "c")
    (store / "b" / "level-1.faiss").unlink()
    assert stores.rollback(store) == "a"


def test_a_store_without_an_active_bundle(sources: dict[str, Path], tmp_path: Path) -> None:
    stores.publish(tmp_path / "new" / "store", sources["a"])
    store = tmp_path / "new" / "store"
    assert stores.current(store) is None
    with pytest.raises(BundleNotFoundError, match="no active bundle"):
        stores.resolve_bundle(store)
    with pytest.raises(StoreError, match="was active before None"):
        stores.rollback(store)
    assert [entry.active for entry in stores.list_bundles(store)] == [False]


def test_paths_that_are_no_store(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(BundleNotFoundError, match="no index bundle or store"):
            stores.resolve_bundle(path)
        for call in (stores.list_bundles, stores.rollback, lambda path: stores.activate(path, "a")):
            with pytest.raises(StoreError, match="no index store"):
                call(path)
    (store / "b" / "manifest.json").unlink()
    with pytest.raises(BundlePartialError, match=r"no manifest\.json"):
        stores.resolve_bundle(store / "b")


def test_a_bundle_is_not_taken_for_a_store(store: Path, sources: dict[str, Path]) -> None:
    with pytest.raises(StoreError, match="is a bundle and not a store"):
        stores.list_bundles(store / "a")
    with pytest.raises(StoreError, match="is a bundle and not a store"):
        stores.publish(store / "a", sources["c"])
    assert verify_bundle(store / "a").ok


def test_a_pointer_to_nothing_and_a_damaged_pointer(store: Path) -> None:
    shutil.rmtree(store / "a")
    with pytest.raises(BundleNotFoundError, match="names 'a', which is not there"):
        stores.resolve_bundle(store)
    entries = stores.list_bundles(store)
    assert [(entry.name, entry.active, entry.problem is None) for entry in entries] == [
        ("a", True, False),
        ("b", False, True),
    ]
    for content in (b"", b"../../etc\n", b"\xff\n", b"a\nb\n"):
        (store / "CURRENT").write_bytes(content)
        with pytest.raises(StoreError, match="CURRENT"):
            stores.resolve_bundle(store)
    stores.activate(store, "b")
    assert active_bundle(store) == "b"


def newer_schema(path: Path) -> None:
    (path / "manifest.json").write_text(json.dumps({"schema_version": 99}))


def truncated(path: Path) -> None:
    content = (path / "level-2.faiss").read_bytes()
    (path / "level-2.faiss").write_bytes(content[:-10])


def missing(path: Path) -> None:
    (path / "cells.lmdb" / "data.mdb").unlink()


def without_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def under_another_name(path: Path) -> None:
    finish_bundle(path, read_manifest(path).model_copy(update={"name": "z"}))


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (newer_schema, BundleSchemaError),
        (truncated, BundleCorruptError),
        (missing, BundlePartialError),
        (without_manifest, BundlePartialError),
        (under_another_name, BundleInconsistentError),
    ],
)
def test_damaged_bundles_are_listed_with_their_problem_and_not_activated(
    store: Path, damage: Any, error: type[Exception]
) -> None:
    damage(store / "b")
    (entry,) = (entry for entry in stores.list_bundles(store) if entry.name == "b")
    assert entry.problem is not None
    with pytest.raises(error) as caught:
        stores.activate(store, "b")
    assert str(caught.value) == entry.problem
    assert active_bundle(store) == "a"
    assert not (store / "HISTORY").exists()


def test_unknown_bundles_are_not_activated(store: Path) -> None:
    with pytest.raises(BundleNotFoundError, match="no bundle 'x'"):
        stores.activate(store, "x")
    assert active_bundle(store) == "a"


def flipped(path: Path) -> None:
    content = bytearray((path / "level-3.faiss").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "level-3.faiss").write_bytes(content)


def wrong_answers(path: Path) -> None:
    query, *rest = read_manifest(path).golden_queries
    changed = query.model_copy(update={"scores": tuple(score + 1 for score in query.scores)})
    finish_bundle(path, read_manifest(path).model_copy(update={"golden_queries": (changed, *rest)}))


@pytest.mark.parametrize(
    ("damage", "verify", "error"),
    [
        (newer_schema, True, BundleSchemaError),
        (truncated, True, BundleCorruptError),
        (missing, False, BundlePartialError),
        (without_manifest, True, BundlePartialError),
        (flipped, True, BundleCorruptError),
        (flipped, False, BundleCorruptError),
        (wrong_answers, True, BundleInconsistentError),
    ],
)
def test_damaged_bundles_are_not_published(
    store: Path, sources: dict[str, Path], tmp_path: Path, damage: Any, verify: bool, error: type[Exception]
) -> None:
    source = shutil.copytree(sources["c"], tmp_path / "c")
    damage(source)
    before = sorted(path.name for path in store.iterdir())
    with pytest.raises(error):
        stores.publish(store, source, verify=verify, activate=True)
    assert sorted(path.name for path in store.iterdir()) == before
    assert active_bundle(store) == "a"


def test_verification_can_be_left_out(store: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["c"], tmp_path / "c")
    wrong_answers(source)
    stores.publish(store, source, verify=False)
    assert not verify_bundle(store / "c").ok


def test_publishing_again_over_a_damaged_copy_says_so(store: Path, sources: dict[str, Path]) -> None:
    flipped(store / "b")
    with pytest.raises(BundleCorruptError, match=r"level-3\.faiss"):
        stores.publish(store, sources["b"])


def test_what_a_dead_publisher_left_is_ignored_and_removed(store: Path, sources: dict[str, Path]) -> None:
    shutil.copytree(sources["c"], store / ".publish-c-999999")
    (store / ".publish-d-999998").mkdir()
    assert [entry.name for entry in stores.list_bundles(store)] == ["a", "b"]
    assert active_bundle(store) == "a"
    stores.publish(store, sources["c"])
    assert list(store.glob(".publish-*")) == []


def test_publishers_and_activators_take_turns(sources: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    stores.publish(store, sources["a"], activate=True)
    errors: list[BaseException] = []
    stop = threading.Event()

    def publish(name: str) -> None:
        try:
            stores.publish(store, sources[name[0]], name=name, verify=False, activate=True)
        except Exception as error:  # noqa: BLE001 - reported by the main thread
            errors.append(error)

    def read() -> None:
        try:
            while not stop.is_set():
                name = open_bundle(stores.resolve_bundle(store)).manifest.name
                assert name == "a" or re.fullmatch("[abc]-[0-9]", name)
                assert all(entry.problem is None for entry in stores.list_bundles(store))
        except Exception as error:  # noqa: BLE001 - reported by the main thread
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    writers = [threading.Thread(target=publish, args=(f"{'abc'[n % 3]}-{n}",)) for n in range(8)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert errors == []
    assert len(stores.list_bundles(store)) == 9
    history = (store / "HISTORY").read_text().split()
    assert len(history) == 8
    assert {*history, stores.current(store)} == {entry.name for entry in stores.list_bundles(store)}


def test_two_processes_publish_one_name_once(sources: dict[str, Path], tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from geosurge import store\n"
        "try:\n    store.publish(Path(sys.argv[1]), Path(sys.argv[2]), name='same', verify=False)\n"
        "except store.StoreError:\n    sys.exit(3)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "store"), str(sources[name])])
        for name in ("a", "b", "c")
    ]
    assert sorted(process.wait() for process in processes) == [0, 3, 3]
    assert verify_bundle(tmp_path / "store" / "same").ok


@pytest.fixture(scope="module")
def power_cut_results(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, power_cuts.__file__, sources["a"], sources["full"], tmp_path_factory.mktemp("work")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    return results


def test_a_publisher_killed_at_any_step_leaves_the_old_bundle_open(power_cut_results: dict[str, Any]) -> None:
    result = power_cut_results["publish"]
    assert len(result["cuts"]) > 25
    for step, cut in zip(result["trace"][result["first"] :], result["cuts"], strict=True):
        assert cut["after"]["opened"] == "old", step
        assert cut["after"]["bundles"] in ([["old", None]], [["new", None], ["old", None]]), step
        assert cut["again"]["error"] is None, step
        assert cut["again"]["bundles"] == [["new", None], ["old", None]], step
        assert cut["again"]["left"] == ["new", "old"], step
    assert result["end"]["opened"] == "old"


@pytest.mark.parametrize("operation", ["publish and activate", "activate"])
def test_an_activation_killed_at_any_step_opens_the_old_bundle_or_the_new(
    power_cut_results: dict[str, Any], operation: str
) -> None:
    result = power_cut_results[operation]
    opened = [cut["after"]["opened"] for cut in result["cuts"]]
    moved = opened.index("new")
    assert set(opened[:moved]) == {"old"}
    assert set(opened[moved:]) == {"new"}
    for step, cut in zip(result["trace"][result["first"] :], result["cuts"], strict=True):
        assert (cut["again"]["opened"], cut["again"]["error"]) == ("new", None), step
    assert result["end"]["opened"] == "new"


def test_a_rollback_killed_at_any_step_opens_one_of_both(power_cut_results: dict[str, Any]) -> None:
    result = power_cut_results["rollback"]
    opened = [cut["after"]["opened"] for cut in result["cuts"]]
    moved = opened.index("old")
    assert set(opened[:moved]) == {"new"}
    assert set(opened[moved:]) == {"old"}
    assert {cut["again"]["opened"] for cut in result["cuts"]} == {"old"}


def test_everything_is_flushed_before_it_gets_its_name(power_cut_results: dict[str, Any]) -> None:
    trace = [step.split(" ") for step in power_cut_results["publish and activate"]["trace"]]
    written = {path for event, path in trace if event == "open" and not path.endswith(".lock")}
    temporary = next(path for event, path in trace if event == "os.rename" and "/" not in path and "publish" in path)
    named = trace.index(["os.rename", temporary])
    # Content before names: files, the directories that list them, the manifest's name, the bundle's name, and CURRENT.
    for file in sorted(written):
        flushed = trace.index(["fsync", file])
        assert trace.index(["open", file]) < flushed
        renamed = [position for position, step in enumerate(trace) if step == ["os.rename", file]]
        assert all(flushed < position for position in renamed)
        folder = Path(file).parent.as_posix()
        if file.startswith(temporary):
            assert any(step == ["fsync", folder] for step in trace[flushed:named]), file
    manifest = trace.index(["os.rename", f"{temporary}/.manifest.json.partial"])
    data = [path for path in written if path.startswith(temporary) and not path.endswith(".partial")]
    assert len(data) == 7
    assert all(trace.index(["fsync", path]) < manifest for path in data)
    assert ["fsync", temporary] in trace[manifest:named]
    pointer = trace.index(["os.rename", ".CURRENT.partial"])
    assert ["fsync", "."] in trace[named:pointer]
    assert trace[pointer + 1] == ["fsync", "."]


def test_the_default_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(stores.STORE_VARIABLE, str(tmp_path))
    assert stores.default_store() == tmp_path
    monkeypatch.delenv(stores.STORE_VARIABLE)
    checkout = Path(__file__).resolve().parents[2]
    assert stores.default_store() == checkout / "indexes"
