"""The list of shards that engines take from: what is not seen from outside (`test_generate.py`)."""

from __future__ import annotations

import json
import socket

from spinreg_core.generation.pool import Pool, _Engine
from spinreg_core.generation.shards import Rows
from spinreg_core.generation.worker import planned
from spinreg_core.runs import fetch
from tests.support.generation_fixtures import House


def test_pool_worker_finishes_its_source_before_returned_shards(house: House) -> None:
    """It would load that one's policy again, and then its own."""
    job = house.job("pool", iterates=[2, 1, 0], shard_size=1)
    shards, _ = planned(job, Rows(fetch.fetch_file(house.store, "data", "train.parquet")))
    pool = Pool(job, house.store, shards, [{}], lambda n: None, lambda number, meta: None)
    second = [shard for shard in shards if shard.source.iterate == 1]
    pool.left = [shards[0], *second[-2:], *(shard for shard in shards if shard.source.iterate == 2)]
    ours, its = socket.socketpair()
    with ours, its, its.makefile() as lines:
        engine = _Engine(ours, 0, None, source=second[0].source)
        given = []
        while pool.left:
            pool._assign(engine)
            given.append([shards[number].source.iterate for number in json.loads(lines.readline())])
    assert given[:2] == [[1, 1], [0]]
    assert {iterate for wave in given[2:] for iterate in wave} == {2}
