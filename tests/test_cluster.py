"""Sweeps through joblib on a local cluster of two workers: the rows of one process, also when a worker is killed.

The clusters are an extra: pip install -e '.[cluster]'"""
import os

import dying
import pytest
import torch
from test_benchmarks import TASKS, same_rows, several

from entrodrop import benchmarks
from entrodrop.benchmarks import local_tasks, sweep
from entrodrop.dynamics import measure

try: local_tasks()
except ModuleNotFoundError as e: pytest.skip(str(e), allow_module_level=True)


def ray_cluster():
    ray = pytest.importorskip("ray", reason="needs Ray and Dask: make test-cluster")
    environment = dict(env_vars=dict(PYTHONPATH=os.path.dirname(__file__)))
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, runtime_env=environment)
    return ray.shutdown, dict(ray_remote_args=dict(num_cpus=1))


def dask_cluster():
    distributed = pytest.importorskip("distributed", reason="needs Ray and Dask: make test-cluster")
    client = distributed.Client(n_workers=2, threads_per_worker=1, dashboard_address=None)
    return client.shutdown, {}


CLUSTERS = dict(ray=ray_cluster, dask=dask_cluster)


@pytest.mark.parametrize("backend", CLUSTERS)
def test_a_cluster_gives_the_rows_of_one_process_and_outlives_a_worker(backend, word_model, word_folder, tmp_path,
                                                                       monkeypatch):
    stop, pool = CLUSTERS[backend]()
    try:
        ids = torch.randint(3, 250, (4, 40), generator=torch.Generator().manual_seed(0))
        plans = several(measure(word_model[0], ids))
        alone = sweep(*word_model, plans, TASKS, tmp_path / "alone", 4)
        def on_cluster(store):
            return sweep(str(word_folder), None, plans, TASKS, tmp_path / store, 4, jobs=2, backend=backend, pool=pool)
        same_rows(alone, on_cluster("cluster"))
        monkeypatch.setattr(benchmarks, "fill_cell", dying.once)
        same_rows(alone, on_cluster("killed/store"))
        assert (tmp_path / "killed/died").exists()
    finally: stop()
