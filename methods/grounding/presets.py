"""Named sizes of grounding methods: what ``preset: NAME`` lays under the settings of a stage.

``..._small`` trains on two cores in minutes (pictures of 48 px), ``..._base`` is the published size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SMALL_ENCODER: Mapping[str, Any] = {
    "patch_size": 6,
    "width": 96,
    "num_layers": 4,
    "num_heads": 4,
    "drop_path": 0.0,
}
SMALL_64_ENCODER: Mapping[str, Any] = {**SMALL_ENCODER, "patch_size": 8, "width": 128}
BASE_ENCODER: Mapping[str, Any] = {
    "patch_size": 16,
    "width": 768,
    "num_layers": 12,
    "num_heads": 12,
    "drop_path": 0.1,
    "vocabulary_rows": 64_010,
}
LARGE_ENCODER: Mapping[str, Any] = {**BASE_ENCODER, "width": 1024, "num_layers": 24, "num_heads": 16}

LATENT_VG: Mapping[str, Mapping[str, Any]] = {
    "latent_vg_small": {**SMALL_ENCODER, "channels": 48, "pyramid": False, "num_concepts": 32},
    "latent_vg_small_64": {
        **SMALL_64_ENCODER,
        "channels": 64,
        "pyramid": False,
        "num_concepts": 32,
        "attribute_lengths": (2, 4),
    },
    "latent_vg_base": BASE_ENCODER,
    "latent_vg_large": LARGE_ENCODER,
    "latent_vg_as_released": {
        **BASE_ENCODER,
        "concept_temperature": 1.0,
        "slot_temperature": 1.0,
        "inject": "replace",
    },
}

SHARED_RIS: Mapping[str, Mapping[str, Any]] = {
    "shared_ris_small": {**SMALL_ENCODER, "channels": 48, "pyramid": False, "taps": (2, 4)},
    "shared_ris_small_64": {**SMALL_64_ENCODER, "channels": 64, "pyramid": False, "taps": (2, 4)},
    "shared_ris_base": BASE_ENCODER,
    "shared_ris_large": {**LARGE_ENCODER, "taps": (8, 16, 24)},
}
