"""Bulk geotagging: a whole archive in, one row for each picture out.

`run` does the steps in this order, and notes in the `ledger` (its file: `locked_database`) what came of each:

1. `sources` find the pictures, in folders, lists and tar shards.
2. `tasks` look, in the processes of the `pool`, which of them have a position already; `metadata` reads and writes it.
3. `locating` decodes the others with the same tasks and pool, and sends them in batches to one of the `backends`: an
   index that is opened here, or a server. With ``--ray``, `cluster` does this on other machines.
4. `writes` put the answers into sidecars or pictures, where that is asked for, and can take them back.
5. `outputs` put all rows (`rows` says what one is) out as files, `report` makes a page of them, and `audit` compares
   them with the truth where that is known.
"""
