"""From pictures on a disk to answers over gRPC: every step as its user runs it, in a process of its own.

The world is rendered: views of the Earth 400 to 900 km across. Chance is the better of two answers that look at no
picture: the one place that lies near the most pictures, and the answers to other pictures. `FACTOR` says how many times
as often as chance the trained index must be near.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from support.archives import write_views
from support.processes import server_process
from support.shards import write_shard

from geosurge.client import Client
from geosurge.errors import GeoSurgeError
from geosurge.geodesy import great_circle_km
from geosurge.location import Location

NEAR_KM = 1000.0
FACTOR = 3.0
KNOWN, UNSEEN = 5000, 300
VIEWS_A_SHARD = 500
SEED = 1

Place = tuple[float, float]

_RECIPE = """
name = "views"
seed = {seed}

[data]
held_out_share = 0.05
{data}

[partition]
tau_min = 8
tau_max = [900, 300, 100]

[encoder.vision]
image_size = 32
frozen = false

[encoder.vision.backbone]
model_type = "resnet"
layer_type = "basic"
embedding_size = 24
hidden_sizes = [32, 64, 96]
depths = [1, 1, 1]

[encoder.segmentation]
image_size = 32
class_count = 7

[encoder.segmentation.backbone]
model_type = "segformer"
num_encoder_blocks = 2
depths = [1, 1]
sr_ratios = [2, 1]
hidden_sizes = [8, 8]
patch_sizes = [7, 3]
strides = [4, 2]
num_attention_heads = [1, 1]
mlp_ratios = [2, 2]
decoder_hidden_size = 8

[encoder.fusion]
dimension = 64
width = 64
latent_width = 32
blocks = 1

[training]
steps = {steps}
batch_size = 64
learning_rate = 3e-3
warmup_steps = 40
weight_decay = 1e-2
negatives = "all_cells"

[calibration]
count = 200

[bundle]
description = "Views of the Earth from orbit."
can = "views of land, 400 to 900 km across"
cannot = "anything else"
"""


@dataclass(frozen=True)
class Views:
    """Rendered views on a disk.

    Attributes:
        folder: Where they are.
        known: Those to train with: where each was taken, by its name relative to the folder.
        unseen: Those to be located.
    """

    folder: Path
    known: dict[str, Place]
    unseen: dict[str, Place]


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Views:
    folder = tmp_path_factory.mktemp("views")
    places = list(write_views(folder, KNOWN + UNSEEN, side=40, seed=SEED).items())
    return Views(folder, dict(places[:KNOWN]), dict(places[KNOWN:]))


def write_table(folder: Path, views: Views) -> str:
    """A table of the views as MP-16's is."""
    with (folder / "views.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["IMG_ID", "LAT", "LON"])
        rows.writerows([name, *place] for name, place in views.known.items())
    return f'source = "table"\ntable = "views.csv"\nimages = "{views.folder}"'


def write_shards(folder: Path, views: Views) -> str:
    """The views in WebDataset shards."""
    known = list(views.known.items())
    for shard, start in enumerate(range(0, len(known), VIEWS_A_SHARD)):
        members = []
        for number, (name, (latitude, longitude)) in enumerate(known[start : start + VIEWS_A_SHARD], start):
            told = json.dumps({"latitude": latitude, "longitude": longitude}).encode()
            members += [(f"{number:06d}.jpg", (views.folder / name).read_bytes()), (f"{number:06d}.json", told)]
        write_shard(folder / f"views-{shard:03d}.tar", members)
    return f'source = "webdataset"\nshards = "views-{{000..{shard:03d}}}.tar"'


def run(*words: object) -> None:
    """Runs a command that is installed beside this Python."""
    command = [str(Path(sys.executable).with_name(str(words[0]))), *map(str, words[1:])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def place_of(answer: Location | GeoSurgeError) -> Place:
    assert isinstance(answer, Location), answer
    return answer.latitude_deg, answer.longitude_deg


def share_near(answers: npt.NDArray[np.float64], truths: npt.NDArray[np.float64]) -> float:
    """Share of (n, 2) answers that lie near their (n, 2) truths."""
    return float((great_circle_km(*answers.T, *truths.T) <= NEAR_KM).mean())


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("write", "steps"), [(write_table, 600), (write_shards, 400)])
def test_pictures_on_a_disk_become_a_server_that_locates_others(
    tmp_path: Path, views: Views, write: Callable[[Path, Views], str], steps: int
) -> None:
    recipe, directory, store = tmp_path / "recipe.toml", tmp_path / "run", tmp_path / "store"
    recipe.write_text(_RECIPE.format(data=write(tmp_path, views), steps=steps, seed=SEED))
    for step in ("fit", "build", "calibrate"):
        run("geosurge-train", step, recipe, "--run", directory)
    run("geosurge", "index", "publish", directory / "views", "--store", store, "--activate")

    with server_process(store) as server, Client(server.address) as client:
        located = list(client.locate_many(views.folder / name for name in views.unseen))
    answers = np.array([place_of(answer) for answer in located])
    truths = np.array(list(views.unseen.values()))
    near = share_near(answers, truths)
    constant = max(share_near(np.broadcast_to(place, truths.shape), truths) for place in truths)
    shuffled = float(np.mean([share_near(np.roll(answers, shift, axis=0), truths) for shift in range(1, UNSEEN)]))
    assert near > FACTOR * max(constant, shuffled), (near, constant, shuffled)
