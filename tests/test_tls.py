"""A cluster that speaks TLS: who has no certificate is refused, and the object is the same."""

from __future__ import annotations

import socket

import numpy as np
import pytest
from distributed import Client
from models_for_tests import LinearModel

from ptychodask.cluster import clients
from ptychodask.cluster.clients import connected_client, local_client
from ptychodask.cluster.tls import credentials_in, temporary_credentials
from ptychodask.errors import PtychodaskError
from ptychodask.reconstruction import reconstruct
from ptychodask.simulate import simulate

pytestmark = pytest.mark.usefixtures("empty_caches")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("tls") / "scan.zarr"
    simulate(path, n_pixels=16, n_patterns=60, step_px=3.0, seed=1, progress=False)
    return path


def write_credentials(folder, security):
    config = security.get_tls_config_for_role("client")
    (folder / "ca.pem").write_text(config["ca_file"])
    (folder / "cert.pem").write_text(config["cert"])
    (folder / "key.pem").write_text(config["key"])


def test_the_object_is_the_same_and_strangers_are_refused(store, client, tmp_path, monkeypatch):
    fields = {"groups_per_chunk": 10, "tile": 24, "progress": False}
    plain = reconstruct(store, LinearModel(), client=client, **fields)
    security = temporary_credentials()
    write_credentials(tmp_path, security)
    monkeypatch.setattr(clients, "ANSWER_WITHIN", "2s")
    with local_client(1, security=security) as encrypted:
        address = encrypted.scheduler.address
        assert address.startswith("tls://127.0.0.1:")
        assert all(worker.startswith("tls://127.0.0.1:") for worker in encrypted.scheduler_info()["workers"])
        found = reconstruct(store, LinearModel(), client=encrypted, **fields)
        with connected_client(address, security=credentials_in(tmp_path)) as known:
            assert known.submit(sum, [1, 2]).result() == 3
        told = "no Dask scheduler answers .*--tls-folder"
        with pytest.raises(PtychodaskError, match=told), connected_client(address):
            pass
        with pytest.raises(PtychodaskError, match=told), connected_client(address, security=temporary_credentials()):
            pass
        with pytest.raises(OSError, match=r"."), Client(address.replace("tls", "tcp"), timeout="2s"):
            pass
    for name in ("object", "weight", "uncertainty", "count"):
        np.testing.assert_array_equal(found[name].values, plain[name].values)


def test_incomplete_credentials_are_named(tmp_path):
    (tmp_path / "ca.pem").touch()
    with pytest.raises(PtychodaskError, match=r"contains no cert\.pem; expected ca\.pem, cert\.pem, key\.pem"):
        credentials_in(tmp_path)


def test_a_cluster_of_ours_listens_on_the_loopback_interface_alone(store):
    with local_client(1) as client:
        addresses = [client.scheduler.address, *client.scheduler_info()["workers"]]
        own = socket.gethostbyname(socket.gethostname())
        ports = [int(address.rpartition(":")[2]) for address in addresses]
        assert all(address.startswith("tcp://127.0.0.1:") for address in addresses)
        for port in ports if not own.startswith("127.") else ():
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((own, port), timeout=2).close()
