"""The autoencoder: pictures of 64 x 64 pixels to latents of 4 x 8 x 8 and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from tools.shapes.running import Run, generator

BATCH = 16
"""Pictures of one step."""
KL_WEIGHT = 3e-5
"""Weight of the divergence per latent number, beside an absolute error per colour value between -1 and 1."""
EDGE_WEIGHT = 4.0
"""Weight of pixels near an outline, where others have 1: a small star is little else."""
OFF = 0.25
"""Largest deviation of the noise that the decoder learns to put up with; the latents' own is 1."""


def build() -> AutoencoderKL:
    """Make an untrained autoencoder of scale factor 8."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        # Few groups: a norm of single channels would have to carry colours around it.
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        scaling_factor=1.0,
    )


def as_tensor(pictures: np.ndarray) -> torch.Tensor:
    """Bytes (n, height, width, 3) to numbers between -1 and 1 of shape (n, 3, height, width)."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def train(pictures: np.ndarray, seed: int, steps: int, checkpoints: Path | None) -> tuple[AutoencoderKL, float]:
    """Train the autoencoder, and scale its latents to mean 0 and deviation 1.

    Args:
        pictures: bytes of shape (n, 64, 64, 3).
        seed: of weights, order and noise.
        steps: how many batches.
        checkpoints: where to keep and find the state of the training.

    Returns:
        The autoencoder with averaged weights, and the seconds of training.
    """
    torch.manual_seed(seed)
    vae = build()
    run = Run("vae", {"vae": vae}, checkpoints, steps=steps, peak=2e-3, ema=0.995, weight_decay=1e-4)
    for step in run:
        random = generator(seed, step)
        real = as_tensor(pictures[torch.randint(len(pictures), (BATCH,), generator=random).numpy()])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(real).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=random)
            decoded = vae.decode(latents).sample
        error, edge_error = _errors(decoded, real)
        divergence = posterior.kl().float().mean() / latents[0].numel()
        run.update(edge_error + KL_WEIGHT * divergence, error=error.item(), divergence=divergence.item())
    trained: AutoencoderKL = run.average["vae"]
    normalise(trained, pictures[:2048])
    return trained, run.seconds


def polish(
    vae: AutoencoderKL,
    pictures: np.ndarray,
    latents: tuple[torch.Tensor, torch.Tensor],
    seed: int,
    steps: int,
    checkpoints: Path | None,
) -> float:
    """Train the decoder alone, on latents that are a little off, as those of a denoiser are.

    Args:
        vae: a trained autoencoder, whose decoder is replaced by the better one.
        pictures: bytes of shape (n, 64, 64, 3).
        latents: their means and deviations, as `encode` gives them.
        seed: of order and noise.
        steps: how many batches.
        checkpoints: where to keep and find the state of the training.

    Returns:
        The seconds of training.
    """
    vae = vae.requires_grad_(True).train()
    parts = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    run = Run("decoder", parts, checkpoints, steps=steps, peak=1e-3, ema=0.995, weight_decay=1e-4)
    means, deviations = latents
    for step in run:
        random = generator(seed + 2, step)
        chosen = torch.randint(len(pictures), (BATCH,), generator=random)
        real = as_tensor(pictures[chosen.numpy()])
        off = OFF * torch.rand((BATCH, 1, 1, 1), generator=random) + deviations[chosen]
        noisy = means[chosen] + off * torch.randn(real.shape[0], *means.shape[1:], generator=random)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(noisy).sample
        error, edge_error = _errors(decoded, real)
        run.update(edge_error, error=error.item())
    for name, part in parts.items():
        part.load_state_dict(run.average[name].state_dict())
    vae.requires_grad_(False).eval()
    return run.seconds


def _errors(decoded: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean absolute error, plain and with more weight near outlines."""
    error = (decoded.float() - real).abs()
    return error.mean(), (error * weigh_edges(real)).mean()


def weigh_edges(pictures: torch.Tensor) -> torch.Tensor:
    """Weights of pixels, of shape (n, 1, height, width): more within two pixels of an outline."""
    down = F.pad((pictures[:, :, 1:] - pictures[:, :, :-1]).abs().amax(1, keepdim=True), (0, 0, 0, 1))
    right = F.pad((pictures[..., 1:] - pictures[..., :-1]).abs().amax(1, keepdim=True), (0, 1, 0, 0))
    near = F.max_pool2d((torch.maximum(down, right) > 0.1).float(), 5, stride=1, padding=2)
    return 1 + (EDGE_WEIGHT - 1) * near


@torch.no_grad()
def normalise(vae: AutoencoderKL, pictures: np.ndarray) -> None:
    """Make the latents' channels zero in the mean and one in deviation, by changing the 1 x 1 convolutions around them.

    A pipeline knows one factor for all channels and no offset, so these belong into the weights.
    """
    latents, _ = encode(vae, pictures)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    into, back = vae.quant_conv, vae.post_quant_conv
    into.weight[:channels] /= deviation[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / deviation
    into.bias[channels:] -= 2 * deviation.log()
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= deviation[None, :, None, None]


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of pictures.

    Returns:
        Means and deviations, each of shape (n, 4, 8, 8).
    """
    means, deviations = [], []
    for start in range(0, len(pictures), 128):
        posterior = vae.encode(as_tensor(pictures[start : start + 128])).latent_dist
        means.append(posterior.mean)
        deviations.append(posterior.std)
    return torch.cat(means), torch.cat(deviations)
