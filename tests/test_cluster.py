"""Layers solved by a Dask cluster: the same file as on one machine, also where a worker is lost."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
import warnings

import distributed
import h5py
import numpy as np
import pytest

import comq_np
from comq_np import cluster as clusters
from comq_np import parts, pipeline
from comq_np.cli import main

pytestmark = [
    # Dask's own: sockets of a worker that was killed, and its loops, are left to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
LAYERS, SIZE = 12, 96


@pytest.fixture(scope="module")
def cluster():
    """Two worker processes with one thread each."""
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as made:
        yield made


@pytest.fixture
def client(cluster):
    with distributed.Client(cluster) as made:
        made.wait_for_workers(2, timeout=60)
        yield made


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """Layers that take a while; one of them cannot be solved."""
    path = tmp_path_factory.mktemp("calibration") / "calibration.h5"
    with comq_np.CalibrationWriter(path) as file:
        for number in range(LAYERS):
            rng = np.random.default_rng(number)
            gram = comq_np.Gram(SIZE)
            if number != 3:
                gram.update(rng.normal(size=(4 * SIZE, SIZE)) @ rng.normal(size=(SIZE, SIZE)))
            W = rng.normal(size=(SIZE, SIZE))
            file.add(comq_np.Layer(f"layer {number}", W, gram, np.zeros(SIZE) if number % 2 else None))
    return path


@pytest.fixture(scope="module")
def expected(calibration, tmp_path_factory):
    """Bytes of the file that one worker on one thread makes."""
    path = tmp_path_factory.mktemp("expected") / "q.h5"
    with pytest.warns(UserWarning, match="stay float: 'layer 3'"):
        comq_np.quantize_file(calibration, path, workers=1, threads=1)
    return path.read_bytes()


def solve(calibration, path, **options):
    with pytest.warns(UserWarning, match="stay float: 'layer 3'"):
        return comq_np.quantize_file(calibration, path, **options)


def wait_for(parts, count):
    """Wait until so many layers are finished."""
    end = time.monotonic() + 120
    while len(list(parts.glob("layer-*.h5"))) < count and time.monotonic() < end:
        time.sleep(0.002)


@pytest.mark.parametrize("limits", [{}, {"threads": 2, "workers": 1}, {"memory": "100 MB"}])
def test_the_same_file_as_on_one_machine(client, calibration, expected, tmp_path, limits, capsys):
    reports = solve(calibration, tmp_path / "q.h5", client=client, progress=True, **limits)
    assert (tmp_path / "q.h5").read_bytes() == expected
    assert list(reports.kept) == ["layer 3"]
    assert "solve: 100%" in capsys.readouterr().err


def test_layers_of_many_problems(client, tmp_path):
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        for b in (1, 4, 60):
            rng, gram = np.random.default_rng(b), comq_np.Gram(9, problems=b)
            gram.update(rng.normal(size=(40, b, 9)))
            file.add(comq_np.Layer(f"{b} groups", rng.normal(size=(b, 9, 2)), gram, np.zeros((b, 2))))
    for name, options in (("here.h5", {}), ("there.h5", {"client": client})):
        comq_np.quantize_file(tmp_path / "c.h5", tmp_path / name, 3, **options)
    assert (tmp_path / "there.h5").read_bytes() == (tmp_path / "here.h5").read_bytes()


def test_layers_of_different_bits(client, calibration, tmp_path):
    bits = {"*": 3, "layer 1?": 5}
    for name, options in (("here.h5", {}), ("there.h5", {"client": client})):
        solve(calibration, tmp_path / name, bits=bits, recipe="fast", **options)
    assert (tmp_path / "there.h5").read_bytes() == (tmp_path / "here.h5").read_bytes()


@pytest.fixture
def sent(monkeypatch):
    """Workers that see another file in the place of the calibration file, and the layers that they are sent."""
    names, read = [], comq_np.CalibrationFile.__getitem__
    monkeypatch.setattr(pipeline, "fingerprint", lambda _: "of another file")
    monkeypatch.setattr(
        comq_np.CalibrationFile, "__getitem__", lambda self, name: names.append(name) or read(self, name)
    )
    return names


def test_workers_that_do_not_see_the_file_are_sent_the_layers(client, calibration, expected, tmp_path, sent):
    solve(calibration, tmp_path / "q.h5", client=client)
    assert (tmp_path / "q.h5").read_bytes() == expected
    assert sorted(sent) == sorted(f"layer {number}" for number in range(LAYERS))


@pytest.mark.parametrize("seen", [True, False])
def test_parts_of_a_wide_layer_are_tasks_of_their_own(client, tmp_path, monkeypatch, seen):
    monkeypatch.setattr(parts, "WIDE", 20)
    monkeypatch.setattr(parts, "WIDE_ROWS", 0.5)
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        for number, (m, n) in enumerate([(30, 100), (40, 12)]):
            rng = np.random.default_rng(number)
            gram, X = comq_np.Gram(m), rng.normal(size=(2 * m, m)) @ rng.normal(size=(m, m))
            gram.update(X[::2])
            gram.update(X[1::2])
            file.add(comq_np.Layer(f"layer {number}", rng.normal(size=(m, n)), gram, np.zeros(n)))
    comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "one.h5", workers=1)
    if not seen:
        monkeypatch.setattr(pipeline, "fingerprint", lambda _: "of another file")
    begun, submit = [], clusters.Cluster.submit
    monkeypatch.setattr(
        clusters.Cluster, "submit", lambda self, job, threads: begun.append(job) or submit(self, job, threads)
    )
    comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "many.h5", client=client)
    assert (tmp_path / "many.h5").read_bytes() == (tmp_path / "one.h5").read_bytes()
    assert {job.part.start for job in begun if job.part} == {0, 20, 40, 60, 80}
    assert all(layer.matches for layer in comq_np.verify_file(tmp_path / "c.h5", tmp_path / "many.h5"))


def test_a_large_layer_is_sent_without_a_warning(client, tmp_path, sent):
    gram = comq_np.Gram(900)
    gram.update(np.random.default_rng(0).normal(size=(1000, 900)))
    with comq_np.CalibrationWriter(tmp_path / "c.h5") as file:
        file.add(comq_np.Layer("large", np.ones((900, 2), np.float32), gram))
    comq_np.quantize_file(tmp_path / "c.h5", tmp_path / "q.h5", client=client, recipe="rtn")
    assert sent == ["large"]


def test_a_broken_layer_that_would_be_sent(client, calibration, tmp_path, sent):
    path = shutil.copy(calibration, tmp_path / "c.h5")
    with h5py.File(path, "r+") as file:
        file["layers/5/weight"][0, 0] = np.nan
    reports = solve(path, tmp_path / "q.h5", client=client)
    assert list(reports.kept) == ["layer 3", "layer 5"]
    assert reports.kept["layer 5"].startswith("/layers/5")


def test_a_worker_that_is_killed(cluster, client, calibration, expected, tmp_path):
    """Killed while both have work and some of it is done; its layers are solved by the other one, or its successor."""
    parts, before = tmp_path / ".q.h5.parts", {}

    def kill():
        wait_for(parts, 2)
        (worker, *_) = [worker for worker in cluster.workers.values() if worker.process and worker.process.is_alive()]
        os.kill(worker.process.pid, signal.SIGKILL)
        before["killed"], before["finished"] = worker.process.pid, len(list(parts.glob("layer-*.h5")))

    thread = threading.Thread(target=kill)
    thread.start()
    solve(calibration, tmp_path / "q.h5", client=client)
    thread.join()
    assert 2 <= before["finished"] < LAYERS
    assert (tmp_path / "q.h5").read_bytes() == expected


def test_an_interruption_cancels_what_is_not_finished(client, calibration, expected, tmp_path, monkeypatch):
    def interrupted(self, name, q):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comq_np.QuantizedWriter, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            comq_np.quantize_file(calibration, tmp_path / "q.h5", client=client)
    end = time.monotonic() + 60
    while client.run_on_scheduler(count_tasks) and time.monotonic() < end:
        time.sleep(0.01)
    assert client.run_on_scheduler(count_tasks) == 0
    solve(calibration, tmp_path / "q.h5", client=client)
    assert (tmp_path / "q.h5").read_bytes() == expected


def count_tasks(dask_scheduler):
    return len(dask_scheduler.tasks)


def test_a_scheduler_that_is_lost(calibration, expected, tmp_path):
    """What is finished stays so, and the same run goes on without a cluster."""
    parts = tmp_path / ".q.h5.parts"
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0") as made,
        distributed.Client(made) as client,
    ):
        after_two = threading.Thread(target=lambda: (wait_for(parts, 2), made.close()))
        after_two.start()
        with pytest.raises(ConnectionError, match="the Dask scheduler was lost") as error:
            comq_np.quantize_file(calibration, tmp_path / "q.h5", client=client)
        after_two.join()
    assert "layers finished so far" in error.value.__notes__[0]
    reports = solve(calibration, tmp_path / "q.h5")
    assert sum(report.seconds is None for report in reports.values()) >= 2
    assert (tmp_path / "q.h5").read_bytes() == expected


def test_the_command(cluster, calibration, expected, tmp_path, capsys):
    arguments = [str(calibration), str(tmp_path / "q.h5"), "--scheduler", cluster.scheduler_address]
    assert main(["solve", *arguments]) == 3
    assert (tmp_path / "q.h5").read_bytes() == expected
    assert "layer 3: stays float" in capsys.readouterr().out


def test_a_cluster_whose_workers_are_yet_to_come(calibration, expected, tmp_path):
    def come(message, *_):
        said.append(str(message))
        made.scale(1)

    said = []
    with (
        distributed.LocalCluster(n_workers=0, threads_per_worker=2, processes=False, dashboard_address=":0") as made,
        distributed.Client(made) as client,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = come
        comq_np.quantize_file(calibration, tmp_path / "q.h5", client=client)
    assert said[0] == "The Dask cluster has no workers yet: the run begins with the first one."
    assert (tmp_path / "q.h5").read_bytes() == expected


def test_options_are_refused_by_the_workers(client, calibration, tmp_path):
    with pytest.raises(comq_np.InputError, match="`backend` 'cuda': CUDA needs"):
        comq_np.quantize_file(calibration, tmp_path / "q.h5", client=client, backend="cuda")
    with pytest.raises(comq_np.InputError, match="`bits` must be an integer from 1 to 16, got 17"):
        comq_np.quantize_file(calibration, tmp_path / "q.h5", 17, client=client)
    assert not list(tmp_path.iterdir())


def test_strict(client, calibration, tmp_path):
    with pytest.raises(comq_np.InputError, match="layer 'layer 3': `G` must have seen inputs"):
        comq_np.quantize_file(calibration, tmp_path / "q.h5", client=client, strict=True)
    assert not (tmp_path / "q.h5").exists()


def test_workers_of_another_version_are_refused(client, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "__version__", "9.9")
    message = rf"`client` must have workers with comq_np 9\.9, one has {comq_np.__version__}\."
    with pytest.raises(comq_np.InputError, match=message):
        comq_np.quantize_file(calibration, tmp_path / "q.h5", client=client)
    monkeypatch.setattr(clusters, "check", lambda *_: None)  # one that comes later is found out, too
    with pytest.raises(comq_np.InputError, match=message):
        comq_np.quantize_file(calibration, tmp_path / "q.h5", client=client)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("carrier-pigeon://loft:1", "error: `scheduler` must be an address such as tcp://host:8786, got 'carrier"),
        ("", "error: `scheduler` must be an address such as tcp://host:8786, got ''"),
    ],
)
def test_refused_addresses(calibration, tmp_path, capsys, address, message):
    assert main(["solve", str(calibration), str(tmp_path / "q.h5"), "--scheduler", address]) == 2
    assert f"comq solve: {message}" in capsys.readouterr().err


def test_nobody_at_the_address(calibration, tmp_path, capsys):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with distributed.worker.dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        assert main(["solve", str(calibration), str(tmp_path / "q.h5"), "--scheduler", f"tcp://127.0.0.1:{port}"]) == 2
    assert "comq solve: error: Timed out" in capsys.readouterr().err


def test_without_dask(calibration, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(clusters.sys.modules, "distributed", None)
    assert main(["solve", str(calibration), str(tmp_path / "q.h5"), "--scheduler", "tcp://127.0.0.1:1"]) == 2
    assert "`scheduler` needs the package distributed, of the extra `dask`, which is not" in capsys.readouterr().err
