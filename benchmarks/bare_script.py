"""Makes a dataset's images with diffusers alone, as somebody would who has one card and no need for more.

    python benchmarks/bare_script.py prompts.parquet images --threads 1

What benchmarks/one_card.py compares a job with. It prints a line of JSON after each batch: when it was stored, in
seconds since the epoch, and the seconds that the pipeline took.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import diffusers
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image


def main() -> None:
    """Makes the images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    diffusers.utils.logging.disable_progress_bar()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(options.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options.output.mkdir(parents=True)
    prompts = pq.read_table(options.prompts)["prompt"].to_pylist()
    for first in range(0, len(prompts), options.batch_size):
        rows = range(first, min(first + options.batch_size, len(prompts)))
        started = time.time()
        images = pipeline(
            prompt=[prompts[row] for row in rows],
            generator=[torch.Generator("cpu").manual_seed(row) for row in rows],
            output_type="np",
            num_inference_steps=options.steps,
        ).images
        generate_s = time.time() - started
        for row, image in zip(rows, images, strict=True):
            Image.fromarray((image * 255).round().astype(np.uint8)).save(options.output / f"{row}.png")
        print(json.dumps({"time": time.time(), "generate_s": generate_s, "images": len(rows)}), flush=True)


if __name__ == "__main__":
    main()
