"""Locating on Ray: the pictures that a ledger asks for, spread over the machines of a cluster, and their answers back.

The rest of a run is as ever: the ledger says what is to be located, and outputs are made from it. Between the two,
everything lies in files under the run's directory, which every machine must see under the same path, as it must see
the sources and the index:

| ``DIR/.geosurge-ray/KEY/`` | what |
|---|---|
| ``pictures/`` | what is to be located, in parts that are each one task |
| ``answers/`` | a row for each: its answer, or why there is none |
| ``checkpoint/`` | Ray Data's own: which rows of ``answers`` are complete |

KEY stands for index version, encoder and options. A run that was interrupted goes on from its checkpoint; KEY's folder
is removed once the ledger has the answers, and every such folder once nothing is left to be located. Pictures are read
and decoded by tasks, each through a process of its own that a picture may crash, and located by actors, one to a
machine or GPU, that keep the index open.
"""

from geosurge.archive.cluster.locating import CLUSTER_DIRECTORY, clear_exchanges, locate_on_cluster
from geosurge.archive.cluster.session import OWN_CLUSTER, Cluster

__all__ = ["CLUSTER_DIRECTORY", "OWN_CLUSTER", "Cluster", "clear_exchanges", "locate_on_cluster"]
