"""A run in a bucket: what lies there after it, and that another machine goes on from it.

The bucket is in memory, a file system that fsspec is told to take for gs://. Orbax writes arrays
to gs:// without fsspec: `test_a_whole_run_in_a_bucket` does that against an emulator, where there
is one: `pip install gcsfs google-cloud-storage gcp-storage-emulator`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import toy_rows
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from together import QUICK, RLHF_JAX, free_port

from rlhf_jax import bucket, doctor, probes, runs
from rlhf_jax.bucket import Mirror, place
from rlhf_jax.config import ConfigError
from rlhf_jax.experiment import load

ROWS = Path(__file__).parent / "toy_rows.py"


class Bucket(MemoryFileSystem):
    protocol = ("gcs", "gs")
    store, pseudo_dirs = {}, [""]  # its own, not MemoryFileSystem's


@pytest.fixture
def gs(monkeypatch, tmp_path):
    """An empty gs://bucket, and a cache directory of this machine."""
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "machine"))
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = ["", "/bucket"]
    yield epath.Path("gs://bucket")
    fsspec.register_implementation("gcs", "gcsfs.GCSFileSystem", clobber=True)
    epath.backend.fsspec_backend._get_filesystem.cache_clear()


def test_what_is_written_here_is_there_when_sent_and_another_machine_begins_with_it(
    gs, monkeypatch, tmp_path
):
    out = gs / "run"
    with Mirror(out) as mirror:
        (mirror.here / "metrics.jsonl").write_text("1\n")
        (mirror.here / "pools" / "x").mkdir(parents=True)
        (mirror.here / "pools" / "x" / "0.npz").write_bytes(b"rows")
        mirror.send()
        assert (out / "metrics.jsonl").read_text() == "1\n"
        (mirror.here / "metrics.jsonl").write_text("1\n2\n")
    (out / "checkpoints" / "1").mkdir(parents=True)
    (out / "checkpoints" / "1" / "large").write_text("stays there")
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "another"))
    with Mirror(out) as mirror:
        assert str(mirror.here).startswith(str(tmp_path / "another"))
        assert (mirror.here / "metrics.jsonl").read_text() == "1\n2\n"
        assert (mirror.here / "pools" / "x" / "0.npz").read_bytes() == b"rows"
        assert not (mirror.here / "checkpoints").exists()


def test_what_is_sent_is_sent_when_a_run_fails(gs):
    with pytest.raises(RuntimeError), Mirror(gs / "run") as mirror:
        (mirror.here / "nonfinite.npz").write_bytes(b"x")
        raise RuntimeError
    assert (gs / "run" / "nonfinite.npz").exists()


def test_a_path_is_its_own_mirror(tmp_path):
    with Mirror(tmp_path) as mirror:
        assert mirror.here == tmp_path


def test_a_run_in_a_bucket_is_claimed_there_and_found_again(gs):
    out = place("gs://bucket/run")
    record = {"file": str(ROWS), "settings": [], "config": {"a": 1}}
    runs._claim(out, record, resume=False, file="x.py")
    with pytest.raises(ConfigError, match=r"gs://bucket/run already holds this run"):
        runs._claim(out, record, resume=False, file="x.py")
    assert json.loads((out / "run.json").read_text()) == record
    found = runs.find("gs://bucket/run")
    assert found.directory == out and found.value.name == load(ROWS, []).name


def test_other_storage_is_refused_and_a_missing_package_named(monkeypatch):
    with pytest.raises(ConfigError, match=r"valid is a path or gs://BUCKET/RUN"):
        place("s3://b/run")

    def missing(name):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(bucket.fsspec, "get_filesystem_class", missing)
    with pytest.raises(ConfigError, match=r"pip install 'rlhf-jax\[gcs\]' \(Please install"):
        place("gs://bucket/run")
    found = probes.stored("gs://bucket/run")
    line = doctor.storage([found], "gs://bucket/run")
    assert line.todo == "pip install 'rlhf-jax[gcs]' on every host"


@pytest.mark.slow
def test_a_whole_run_in_a_bucket(tmp_path, monkeypatch):
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("gcp_storage_emulator.server")
    port = free_port()
    emulator = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    emulator.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")  # of gcsfs
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    monkeypatch.setenv("XLA_FLAGS", QUICK)
    command = [*RLHF_JAX, "train", ROWS, "--out", "gs://bucket/run"]

    def run(machine, *arguments):
        monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / machine))
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        run("one", "--set", "steps=12")
        shutil.rmtree(tmp_path / "one")  # the machine is gone
        said = run("two", "--set", "steps=20", "--resume")
        assert "report: gs://bucket/run/report.html" in said
        read = "from etils import epath; print(epath.Path('gs://bucket/run/metrics.jsonl').read_text())"
        done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line]
    finally:
        emulator.stop()
    assert [line["step"] for line in lines] == list(range(20))
    rows = [toy_rows.counts(line) for line in lines]
    for epoch in range(6):
        assert [sum(x) for x in zip(*rows[3 * epoch : 3 * epoch + 3], strict=True)] == [1] * 12
