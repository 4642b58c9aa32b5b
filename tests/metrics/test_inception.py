import hashlib
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as reference
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from fluxflow_train.errors import UserError
from fluxflow_train.metrics import inception
from fluxflow_train.metrics.fid import torchmetrics_frechet
from fluxflow_train.metrics.inception import Inception, InceptionFeatures, calibrated_random_inception
from fluxflow_train.metrics.resize import resize

NOBODY = "http://127.0.0.1:1/weights.pth"  # a port that refuses


@pytest.fixture(scope="module")
def extractor() -> InceptionFeatures:
    return calibrated_random_inception(0)


@pytest.fixture(scope="module")
def weights(extractor: InceptionFeatures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole file of the canonical one's form, classifier included, with other weights."""
    path = tmp_path_factory.mktemp("weights") / "other.pth"
    classifier = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save({**extractor.network.state_dict(), **classifier}, path)
    return path


@pytest.fixture(scope="module")
def image() -> Tensor:
    return inception.calibration_images(1)[:3]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch-hub cache without network; where it would keep the file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "URL", NOBODY)
    return tmp_path / "hub" / "checkpoints" / inception.FILE


class OnePage(http.server.BaseHTTPRequestHandler):
    page = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.page)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server on this machine that answers with OnePage.page."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), OnePage) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/weights.pth"
        server.shutdown()
        thread.join()


def test_features_are_torch_fidelitys(weights: Path, image: Tensor) -> None:
    theirs = reference.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(weights))
    ours = Inception(weights, allow_other_weights=True)
    features = ours(image)
    assert features.shape == (3, 2048) and features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(features, theirs(image)[0], rtol=0, atol=1e-5)


def test_the_distance_of_these_features_is_torch_fidelitys(extractor: InceptionFeatures) -> None:
    """The same stored features of 48 pictures; of the first 8 widths, in which that many make full covariances."""
    images = torch.cat([inception.calibration_images(seed) for seed in range(1, 7)])
    real, fake = (part[:, :8].contiguous() for part in extractor(images).split(24))
    statistics = [fid_features_to_statistics(features.double()) for features in (real, fake)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert theirs > 0.001
    assert torchmetrics_frechet(real, fake) == pytest.approx(theirs, rel=1e-6)


def test_random_features_tell_images_apart(extractor: InceptionFeatures, image: Tensor) -> None:
    """A network without calibration gives 1e-8 of difference."""
    features = extractor(image)
    assert features.std(dim=0).mean() > 0.05
    assert torch.linalg.matrix_rank(features - features.mean(0)) == 2


def test_images_are_resized_by_the_named_resizer(extractor: InceptionFeatures) -> None:
    small = inception.calibration_images(2)[:2, :, :90, :70].contiguous()
    assert extractor.resizer == "tf1"
    torch.testing.assert_close(extractor(small), extractor(resize(small, 299, "tf1")), rtol=0, atol=0)
    clean = InceptionFeatures(extractor.network, "clean", None, extractor.weights_sha256)
    assert torch.equal(clean(small), extractor(resize(small, 299, "clean")))
    with pytest.raises(UserError, match="no resizer"):
        Inception("nowhere.pth", resizer="bicubic")


def test_neither_autocast_nor_a_training_around_changes_features(extractor: InceptionFeatures, image: Tensor) -> None:
    expected = extractor(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extractor(image), expected)
    extractor.train()
    assert not any(module.training for module in extractor.modules())
    assert torch.equal(extractor(image), expected)
    torch.testing.assert_close(extractor(image[1:2]), expected[1:2], rtol=0, atol=1e-5)


def test_no_global_draws_and_the_seed_decides(extractor: InceptionFeatures, weights: Path, image: Tensor) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again = calibrated_random_inception(0)
    features = again(image)
    Inception(weights, allow_other_weights=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(features, extractor(image)) and again.weights_sha256 == extractor.weights_sha256
    assert calibrated_random_inception(1).weights_sha256 != extractor.weights_sha256


def test_random_weights_say_so(extractor: InceptionFeatures) -> None:
    assert (extractor.is_random, extractor.is_canonical, extractor.weights_name) == (True, False, None)
    assert extractor.name == "inception-v3-compat" and extractor.num_features == 2048
    fingerprint = extractor.fingerprint()
    assert len(set(fingerprint)) == 8


def test_a_rank_without_images(extractor: InceptionFeatures) -> None:
    features = extractor(torch.zeros(0, 3, 64, 64, dtype=torch.uint8))
    assert features.shape == (0, 2048) and features.dtype == torch.float32
    with pytest.raises(ValueError, match="expected uint8"):
        extractor(torch.zeros(1, 3, 64, 64))


def test_the_canonical_file_is_torch_fidelitys_own_default() -> None:
    assert inception.URL == reference.URL_INCEPTION_V3
    assert inception.FILE.endswith(f"-{inception.CANONICAL_SHA256[:8]}.pth") and len(inception.CANONICAL_SHA256) == 64


def test_other_weights_are_refused_unless_allowed(weights: Path) -> None:
    with pytest.raises(UserError, match=r"not weights-inception.*allow_other_weights=true") as error:
        Inception(weights)
    assert "\n" not in str(error.value)
    allowed = Inception(weights, allow_other_weights=True)
    assert (allowed.is_canonical, allowed.is_random, allowed.weights_name) == (False, False, "other.pth")
    assert allowed.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_a_tampered_file_is_refused(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With our file in the canonical one's place: it is canonical, and no longer so with one bit changed."""
    data = bytearray(weights.read_bytes())
    monkeypatch.setattr(inception, "CANONICAL_SHA256", hashlib.sha256(data).hexdigest())
    assert Inception(weights).is_canonical
    data[len(data) // 2] ^= 1
    tampered = tmp_path / inception.FILE
    tampered.write_bytes(data)
    with pytest.raises(UserError, match="is not weights-inception"):
        Inception(tampered)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_not_executed(tmp_path: Path) -> None:
    """Not even where its hash does not matter."""
    path, proof = tmp_path / "weights.pth", tmp_path / "executed"
    torch.save({"Conv2d_1a_3x3.conv.weight": Malicious(proof)}, path)
    with pytest.raises(UserError, match="is not weights-inception"):
        Inception(path)
    with pytest.raises(UserError, match="holds more than tensors"):
        Inception(path, allow_other_weights=True)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists()  # it would have been


@pytest.mark.parametrize("content", [b"", b"no weights", None, [1], {"x": torch.zeros(1)}, {"x": "text"}])
def test_files_of_something_else(content: object, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=r"damaged|no state dict|another network") as error:
        Inception(path, allow_other_weights=True)
    assert "\n" not in str(error.value)


def test_no_file_and_no_network(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none came from the network.*put it there") as error:
        Inception()
    assert str(hub) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no Inception weights at .*missing\.pth"):
        Inception(tmp_path / "missing.pth")


def test_the_file_is_downloaded_once(hub: Path, server: str, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "URL", server)
    monkeypatch.setattr(OnePage, "page", b"<html>Please log in</html>")
    with pytest.raises(UserError, match="a proxy's page"):
        Inception()
    assert not list(hub.parent.glob("*"))  # nothing half-written
    monkeypatch.setattr(OnePage, "page", weights.read_bytes())
    monkeypatch.setattr(inception, "CANONICAL_SHA256", hashlib.sha256(OnePage.page).hexdigest())
    assert Inception().is_canonical
    assert [path.name for path in hub.parent.iterdir()] == [inception.FILE]
    monkeypatch.setattr(inception, "URL", NOBODY)
    assert Inception().weights_name == inception.FILE
