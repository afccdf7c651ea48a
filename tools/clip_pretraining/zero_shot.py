"""Zero-shot accuracy on the suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from evolora.streams.mosaic.domains import load as load_domains
from evolora.streams.task import Examples


def pictures(data: Examples) -> tuple[Tensor, Tensor]:
    """Returns normalized pictures [n, 3, 64, 64] and labels [n]."""
    examples = [data[row] for row in range(len(data))]
    x = torch.stack([example.inputs["image"] for example in examples]).float() / 255
    return (x - 0.5) / 0.5, torch.tensor([example.label for example in examples])


def top_k(images: Tensor, texts: Tensor, labels: Tensor) -> tuple[float, float]:
    """Returns top-1 and top-5 accuracy in percent."""
    ranked = (images @ texts.T).topk(min(5, len(texts)), dim=1).indices
    hits = ranked == labels[:, None]
    return 100 * float(hits[:, 0].float().mean()), 100 * float(hits.any(1).float().mean())


@torch.no_grad()
def zero_shot(folder: Path, domains: Path) -> list[dict[str, Any]]:
    """Returns top-1 and top-5 of an exported folder on each test split, prompts averaged."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    rows = []
    for task in load_domains(root=domains):
        classes, templates = task.labels.classes, task.labels.templates
        prompts = [template.format(name) for name in classes for template in templates]
        inputs = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        texts = F.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)
        texts = F.normalize(texts.view(len(classes), len(templates), -1).mean(1), dim=-1)
        x, labels = pictures(task.test)
        seen = [model.get_image_features(pixel_values=p).pooler_output for p in x.split(256)]
        one, five = top_k(F.normalize(torch.cat(seen), dim=-1), texts, labels)
        rows.append(
            {
                "domain": task.name,
                "classes": len(classes),
                "images": len(labels),
                "top1": round(one, 1),
                "top5": round(five, 1),
                "chance": round(100 / len(classes), 2),
            }
        )
    return rows
