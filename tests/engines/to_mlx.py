"""Run by MLX's interpreter: FOLDER -> each NAME/hub there is loaded by its library and written to NAME/mlx.

NAME ends in the library's: mlx-lm or mlx-vlm. Prints {NAME: "" or why it does not load} as JSON.
"""

import json
import shutil
import sys
from pathlib import Path

from mlx_lm.utils import load_model, save_model


def convert(folder: Path) -> str:
    """What the library makes of the checkpoint, under the plain configuration of its parent."""
    if folder.name.endswith("mlx-vlm"):
        from mlx_vlm.utils import load_model as load_multimodal

        model = load_multimodal(folder / "hub")
    else:
        model, _ = load_model(folder / "hub")
    save_model(folder / "mlx", model)
    shutil.copy(folder / "parent" / "config.json", folder / "mlx")
    return ""


def attempt(folder: Path) -> str:
    """The libraries say in many ways that a configuration does not suit them."""
    try:
        return convert(folder)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


print(json.dumps({folder.name: attempt(folder) for folder in sorted(Path(sys.argv[1]).iterdir())}))
