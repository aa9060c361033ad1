"""Trains the tiny text-to-image model that ships with the package.

Everything is made here: the pictures, their captions, the weights, the model card and the sheet of samples. A training
that was interrupted goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextModel, CLIPTokenizer

from tools.shapes import denoiser, vae
from tools.shapes.dataset import make_pictures, split
from tools.shapes.evaluate import make_tasks, measure
from tools.shapes.model_card import GUIDANCE, STEPS, Phase, Training, write_card, write_samples
from tools.shapes.vocabulary import build_tokenizer

logger = logging.getLogger("tools.shapes")


def assemble(
    autoencoder: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """Put the parts together as the pipeline that is stored."""
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=denoiser.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load(directory: Path) -> StableDiffusionPipeline:
    """Load a stored model as it is used: in float32."""
    pipeline = StableDiffusionPipeline.from_pretrained(directory, torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def replace_directory(fresh: Path, place: Path) -> None:
    """Put a finished directory in the place of an older one."""
    old = place.with_name(place.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    fresh.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.shapes.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the model is written; replaced when done")
    parser.add_argument("--checkpoints", type=Path, help="where to keep the state of the training, and to find it")
    parser.add_argument("--pictures", type=int, default=12_288, help="how many are drawn (default %(default)s)")
    parser.add_argument("--vae-steps", type=int, default=3000, help="default %(default)s")
    parser.add_argument("--decoder-steps", type=int, default=1500, help="default %(default)s")
    parser.add_argument("--denoiser-steps", type=int, default=8000, help="default %(default)s")
    parser.add_argument("--test-prompts", type=int, default=500, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    return parser.parse_args()


def _options(arguments: argparse.Namespace) -> str:
    """The counts that shape the result, as they are given on the command line."""
    names = ("pictures", "vae-steps", "decoder-steps", "denoiser-steps")
    return "".join(f" --{name} {getattr(arguments, name.replace('-', '_'))}" for name in names)


def main() -> None:
    """Train, measure and write the model."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    diffusers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)

    seed, checkpoints = arguments.seed, arguments.checkpoints
    training_scenes, tuning_scenes, test_scenes = split(seed)
    logger.info("drawing %d pictures of %d combinations", arguments.pictures, len(training_scenes))
    pictures, shown = make_pictures(training_scenes, arguments.pictures, seed)

    autoencoder, vae_seconds = vae.train(pictures, seed, arguments.vae_steps, checkpoints)
    logger.info("encoding the pictures")
    latents = vae.encode(autoencoder, pictures)
    decoder_seconds = vae.polish(autoencoder, pictures, latents, seed, arguments.decoder_steps, checkpoints)

    tokenizer = build_tokenizer()
    progress_tasks = make_tasks(tuning_scenes, 96, seed)

    def watch(step: int, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        pipeline = assemble(autoencoder, text_encoder, unet, tokenizer)
        score = measure(pipeline, progress_tasks, steps=STEPS, guidance=GUIDANCE)
        logger.info("after %d steps: %s", step, score)

    text_encoder, unet, denoiser_seconds = denoiser.train(
        latents,
        shown,
        tokenizer,
        seed=seed,
        steps=arguments.denoiser_steps,
        checkpoints=checkpoints,
        watch=watch,
    )
    fresh = arguments.out.with_name(arguments.out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    assemble(autoencoder, text_encoder, unet, tokenizer).to(torch.float16).save_pretrained(fresh)
    logger.info("measuring the stored model")
    training = Training(
        pictures=arguments.pictures,
        training_scenes=training_scenes,
        tuning_scenes=tuning_scenes,
        test_scenes=test_scenes,
        phases=[
            Phase("autoencoder", arguments.vae_steps, vae.BATCH, vae_seconds),
            Phase("its decoder alone", arguments.decoder_steps, vae.BATCH, decoder_seconds),
            Phase("text encoder and UNet", arguments.denoiser_steps, denoiser.BATCH, denoiser_seconds),
        ],
        shares=(denoiser.EMPTY_SHARE, denoiser.FOREIGN_SHARE, denoiser.DISTURBED_SHARE),
        test_prompts=arguments.test_prompts,
        seed=seed,
        options=_options(arguments),
    )
    for path in fresh.rglob("*.safetensors"):
        # safetensors writes files that only their owner may read; these go into a package.
        path.chmod(0o644)
    pipeline = load(fresh)
    write_card(fresh, pipeline, training)
    write_samples(fresh / "samples.png", pipeline, test_scenes, seed)
    replace_directory(fresh, arguments.out)
    logger.info("wrote %s", arguments.out)


if __name__ == "__main__":
    main()
