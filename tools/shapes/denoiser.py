"""Text encoder and UNet, trained together on the autoencoder's latents."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tools.shapes.pictures import Scene, caption
from tools.shapes.running import Run, generator
from tools.shapes.vocabulary import disturb, foreign

EMPTY_SHARE, FOREIGN_SHARE, DISTURBED_SHARE = 0.10, 0.04, 0.15
"""Captions that are dropped (for classifier-free guidance), replaced by foreign words, or surrounded by them."""

BATCH = 48
"""Latents of one step."""
TEXT_WIDTH = 128


def build_scheduler() -> DDIMScheduler:
    """Make Stable Diffusion 1's own noise schedule; the network predicts velocity."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Make an untrained text encoder for this tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Make an untrained UNet for latents of 8 x 8; attention, to itself and to the text, is at 4 x 4."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def write_caption(scene: Scene, rng: random.Random) -> str:
    """A caption as the training sees it: mostly a true one, sometimes none."""
    kind = rng.random()
    if kind < EMPTY_SHARE:
        return ""
    if kind < EMPTY_SHARE + FOREIGN_SHARE:
        return foreign(rng)
    if kind < EMPTY_SHARE + FOREIGN_SHARE + DISTURBED_SHARE:
        return disturb(caption(scene, rng), rng)
    return caption(scene, rng)


def train(
    latents: tuple[torch.Tensor, torch.Tensor],
    shown: list[Scene],
    tokenizer: CLIPTokenizer,
    *,
    seed: int,
    steps: int,
    checkpoints: Path | None,
    watch: Callable[[int, CLIPTextModel, UNet2DConditionModel], None] | None = None,
) -> tuple[CLIPTextModel, UNet2DConditionModel, float]:
    """Train text encoder and UNet.

    Args:
        latents: means and deviations of the pictures' latents, each of shape (n, 4, 8, 8).
        shown: what each of the pictures shows.
        tokenizer: of the text encoder.
        seed: of weights, order, captions and noise.
        steps: how many batches.
        checkpoints: where to keep and find the state of the training.
        watch: called every thousand steps with the number of steps done and the averaged modules.

    Returns:
        Text encoder and UNet with averaged weights, and the seconds of training.
    """
    torch.manual_seed(seed + 1)
    text_encoder, unet = build_text_encoder(tokenizer), build_unet()
    unet = unet.to(memory_format=torch.channels_last)  # A third faster on a CPU.
    modules = {"text_encoder": text_encoder.train(), "unet": unet.train()}
    scheduler = build_scheduler()
    run = Run("denoiser", modules, checkpoints, steps=steps, peak=1e-3)
    means, deviations = latents
    for step in run:
        if watch and step and step % 1000 == 0:
            watch(step, run.average["text_encoder"], run.average["unet"])
        noise_source, words = generator(seed + 1, step), random.Random(f"{seed}/{step}")
        chosen = torch.randint(len(shown), (BATCH,), generator=noise_source)
        captions = [write_caption(shown[i], words) for i in chosen.tolist()]
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        clean = means[chosen]
        clean = clean + deviations[chosen] * torch.randn(clean.shape, generator=noise_source)
        noise = torch.randn(clean.shape, generator=noise_source)
        # One time out of each equal part of the schedule: the same as at random, with less spread from batch to batch.
        parts = (torch.arange(BATCH) + torch.rand(BATCH, generator=noise_source)) / BATCH
        times = (parts * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(clean, noise, times)
        velocity = scheduler.get_velocity(clean, noise, times)
        guess = unet(noisy, times, text_encoder(tokens).last_hidden_state).sample
        run.update(F.mse_loss(guess, velocity))
    return run.average["text_encoder"], run.average["unet"], run.seconds
