"""The same architectures in PyTorch, for `python -m jax_densevit.benchmark --peers`: needs the extra `peers`.

A peer is counted as the same architecture only if its number of parameters is ours. ViT: timm and transformers. U-Net:
segmentation-models-pytorch has no plain U-Net (its Unet decodes a classification network), so the form that ours has is
written out below in PyTorch layers, and smp's Unet on a VGG-11 encoder is timed beside it as another architecture.
"""

import importlib
import os
import warnings
from importlib import metadata
from typing import Any

from jax_densevit.errors import UserError
from jax_densevit.models.counts import count_parameters
from jax_densevit.timing import Contender, Job, build_model

PACKAGES = {"torch": "torch", "timm": "timm", "segmentation_models_pytorch": "segmentation-models-pytorch"}
_DTYPES = ("float32", "bfloat16")


def check_installed(platform: str, dtype: str) -> None:
    """Imports the peers; :class:`UserError` when they are missing or cannot run where JAX runs.

    Args:
      platform: JAX's backend, "cpu" or "gpu".
      dtype: type of the computation.
    """
    if dtype not in _DTYPES:
        raise UserError(f"--peers can compute in {' or '.join(_DTYPES)}, not in {dtype}.")
    try:
        import torch

        _make_torchvision_importable(torch)
        for module in PACKAGES:
            importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--peers needs {error.name or 'PyTorch and its friends'}, which is not installed; "
            "pip install 'jax_densevit[peers]' brings it."
        ) from error
    if platform == "gpu" and not torch.cuda.is_available():
        raise UserError("JAX computes on the GPU and the installed PyTorch cannot; install its CUDA build for --peers.")
    if platform not in ("cpu", "gpu"):
        raise UserError(f"--peers compares on CPUs and NVIDIA GPUs, and JAX runs on {platform!r}.")
    if platform == "cpu" and hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))


def _make_torchvision_importable(torch) -> None:
    """Lets a torchvision built for CUDA be imported beside a CPU build of PyTorch.

    That pair is what pip resolves to on machines without a GPU. Its import fails because its compiled operators are
    absent; nothing timed here calls them, so their names alone are enough.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _make_torchvision_importable.library = library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


def versions() -> dict[str, str]:
    """Versions of the installed peers."""
    found = {}
    for package in (*PACKAGES.values(), "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def contenders(job: Job, batch: int, train: bool, dtype: str) -> tuple[list[Contender], str]:
    """Every peer of a job, ready to be timed, and a sentence for the report ("" when there is nothing to say)."""
    builders = {"vit": _vits, "unet": _unets}
    if job.name not in builders:
        return [], f"{job}: no PyTorch package has this architecture; it was timed alone."
    ours = count_parameters(build_model(job, {}), job.size)
    found, notes = [], []
    for label, module in builders[job.name](job):
        parameters = sum(p.numel() for p in module.parameters())
        same = parameters == ours
        if not same:
            notes.append(f"* {label} has {parameters:,} parameters and ours {ours:,}: not the same architecture.")
        for contender in _time_torch(label, module, job, batch, train, dtype):
            contender.same = same
            contender.facts["parameters"] = parameters
            found.append(contender)
    return found, "\n".join(notes)


def _time_torch(label: str, module: Any, job: Job, batch: int, train: bool, dtype: str) -> list[Contender]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() and _on_gpu() else "cpu")
    module = module.to(device)
    if device.type == "cpu" and job.name == "unet":
        # PyTorch's own advice for convolutions on CPUs: without it they are up to a third slower.
        module = module.to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, *job.size, device=device)
    if job.name == "unet":
        images = images.contiguous(memory_format=torch.channels_last)
    half = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def forward():
        module.eval()
        with torch.inference_mode(), half:
            return _logits(module(images))

    found = [Contender(label, "forward", forward, wait)]
    if train:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
        with torch.inference_mode():
            shape = _logits(module(images[:1])).shape[2:]
        target = torch.zeros((batch, *shape), dtype=torch.long, device=device)

        def step():
            module.train()
            optimizer.zero_grad(set_to_none=True)
            with half:
                logits = _logits(module(images))
            torch.nn.functional.cross_entropy(logits.float(), target).backward()
            optimizer.step()

        found.append(Contender(label, "train step", step, wait))
    return found


def _on_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"


def _logits(output: Any) -> Any:
    return getattr(output, "logits", output)


def _vits(job: Job) -> list[tuple[str, Any]]:
    import timm

    model = build_model(job, {})
    sizes = {
        "patch_size": model.patch_size,
        "embed_dim": model.hidden_size,
        "depth": model.num_layers,
        "num_heads": model.num_heads,
        "mlp_ratio": model.mlp_size / model.hidden_size,
        "img_size": job.size,
        "num_classes": model.num_classes,
    }
    transformer = timm.models.vision_transformer.VisionTransformer
    if model.distilled:
        transformer = timm.models.deit.VisionTransformerDistilled
    found = [(f"timm {metadata.version('timm')}", transformer(**sizes))]
    if job.size[0] == job.size[1] and not model.distilled and _installed("transformers"):
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            intermediate_size=model.mlp_size,
            image_size=job.size[0],
            patch_size=model.patch_size,
            num_labels=model.num_classes,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        found.append((f"transformers {metadata.version('transformers')}", ViTForImageClassification(config)))
    return found


def _unets(job: Job) -> list[tuple[str, Any]]:
    import segmentation_models_pytorch as smp

    model = build_model(job, {})
    found = [("PyTorch, written out", plain_unet(model.base, model.num_classes, model.bilinear))]
    if job.size[0] % 32 == 0 and job.size[1] % 32 == 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = smp.Unet("vgg11_bn", encoder_weights=None, classes=model.num_classes)
        found.append((f"smp {metadata.version('segmentation-models-pytorch')} Unet, VGG-11", other))
    return found


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def plain_unet(base: int, num_classes: int, bilinear: bool) -> Any:
    """The U-Net of `models/unet.py` in PyTorch layers, for multiples of 16 pixels: a baseline to time."""
    import torch
    from torch import nn

    def double(channels, middle, features):
        layers = []
        for given, made in ((channels, middle), (middle, features)):
            layers += [nn.Conv2d(given, made, 3, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    class PlainUNet(nn.Module):
        def __init__(self):
            super().__init__()
            widths = [base * 2**i for i in range(5)]
            if bilinear:
                widths[-1] //= 2
            self.encoder = nn.ModuleList(double(a, b, b) for a, b in zip([3, *widths], widths, strict=False))
            self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
            channels = widths[-1]
            for i in (3, 2, 1, 0):
                if bilinear:
                    self.up.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True))
                    middle, features = widths[i], widths[i] // 2 if i else base
                    self.decoder.append(double(widths[i] + channels, middle, features))
                else:
                    features = widths[i]
                    self.up.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
                    self.decoder.append(double(widths[i] + channels // 2, features, features))
                channels = features
            self.head = nn.Conv2d(base, num_classes, 1)

        def forward(self, x):
            skips = []
            for i, stage in enumerate(self.encoder):
                if i:
                    skips.append(x)
                    x = nn.functional.max_pool2d(x, 2)
                x = stage(x)
            for up, stage in zip(self.up, self.decoder, strict=True):
                x = stage(torch.cat([skips.pop(), up(x)], dim=1))
            return self.head(x)

    return PlainUNet()
