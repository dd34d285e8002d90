"""What `--data.augment` may say: a preset, single switches in place of its ranges, and the policies' operations."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from tldist.config import UserError, nearest

PolicyName = Literal["none", "rand", "trivial"]


@dataclass(frozen=True)
class AugmentSpec:
    """Ranges to draw from, in the order in which the operations are applied (erasing last).

    A range of None, or a probability of 0, leaves the operation out of the pipeline.
    """

    crop_area: tuple[float, float] | None = None
    """Share of the image's area (random-resized-crop); None: the deterministic evaluation crop."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    rotate_deg: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    """As a share of the full colour circle."""
    grey: float = 0.0
    policy: PolicyName = "none"
    """rand: RandAugment (Cubuk et al., 2020); trivial: TrivialAugment, wide (Mueller and Hutter, 2021)."""
    rand_ops: int = 2
    rand_magnitude: int = 9
    """Of BINS."""
    blur_sigma: tuple[float, float] | None = None
    """Gaussian blur with a 3 x 3 kernel."""
    erase: float = 0.0
    erase_area: tuple[float, float] = (0.02, 0.15)
    erase_ratio: tuple[float, float] = (0.3, 3.3)

    @property
    def colour(self) -> bool:
        """Does any colour operation take part?"""
        return any((self.brightness, self.contrast, self.saturation, self.hue, self.grey))

    @property
    def policy_ops(self) -> int:
        """Operations of the policy that an image goes through."""
        return {"none": 0, "rand": self.rand_ops, "trivial": 1}[self.policy]

    @property
    def only_crops(self) -> bool:
        """Is the square shown as it was cut at random, but for flips?"""
        as_cut = AugmentSpec(crop_area=self.crop_area, crop_ratio=self.crop_ratio, flip=self.flip)
        return self.crop_area is not None and self == as_cut

    @property
    def deterministic(self) -> bool:
        """Is an image always shown the same way?"""
        return self == AugmentSpec()


# torchvision's reference training: Inception crop (Szegedy et al., 2015) and flip.
_BASIC = AugmentSpec(crop_area=(0.08, 1.0), flip=0.5)

PRESETS: dict[str, AugmentSpec] = {
    "none": AugmentSpec(),
    "basic": _BASIC,
    # Lecture 7.2, value by value.
    "lecture": AugmentSpec(
        crop_area=(0.8, 1.0),
        flip=0.5,
        rotate_deg=15,
        brightness=0.2,
        contrast=0.2,
        saturation=0.2,
        hue=0.1,
        grey=0.1,
        blur_sigma=(0.1, 2.0),
        erase=0.2,
    ),
    "randaugment": replace(_BASIC, policy="rand"),
    "trivialaugment": replace(_BASIC, policy="trivial"),
}

_LIMITS: dict[str, tuple[float, float]] = {
    "crop_area": (0.001, 1.0),
    "crop_ratio": (0.01, 100.0),
    "flip": (0.0, 1.0),
    "rotate_deg": (0.0, 180.0),
    "brightness": (0.0, 1.0),
    "contrast": (0.0, 1.0),
    "saturation": (0.0, 1.0),
    "hue": (0.0, 0.5),
    "grey": (0.0, 1.0),
    "rand_ops": (1, 14),
    "rand_magnitude": (0, 30),
    "blur_sigma": (0.01, 100.0),
    "erase": (0.0, 1.0),
    "erase_area": (0.001, 1.0),
    "erase_ratio": (0.01, 100.0),
}
_RANGES = ("crop_area", "crop_ratio", "blur_sigma", "erase_area", "erase_ratio")
_COUNTS = ("rand_ops", "rand_magnitude")


def augment_spec(text: str) -> AugmentSpec:
    """`PRESET[,SWITCH=VALUE ...]` -> its ranges: 'lecture', 'lecture,hue=off,rotate-deg=30', 'basic,crop-area=0.5:1'.

    Raises:
        UserError: an unknown preset or switch, or a value that the switch cannot take.
    """
    preset, *switches = (part.strip() for part in text.split(","))
    if preset not in PRESETS:
        raise UserError(
            f"--data.augment '{preset}' is no preset{nearest(preset, PRESETS)}: begin with {', '.join(PRESETS)}, and "
            "add single switches behind commas, as in 'basic,rotate-deg=30'"
        )
    return replace(PRESETS[preset], **dict(_switch(switch) for switch in switches))


def _switch(text: str) -> tuple[str, Any]:
    """'rotate-deg=30' -> ('rotate_deg', 30.0); 'off' is the value of a spec without the operation."""
    switch, given, value = text.partition("=")
    name, known = switch.replace("-", "_"), {f.name: f.default for f in fields(AugmentSpec)}
    if name not in known:
        words = [field.replace("_", "-") for field in known]
        raise UserError(f"--data.augment has no switch '{switch}'{nearest(switch, words)}: it has {', '.join(words)}")
    if not given or not value:
        raise UserError(f"--data.augment: the switch {switch} needs a value, as in {switch}=off")
    if value == "off":
        return name, known[name]
    if name == "policy":
        if value not in get_args(PolicyName):
            raise UserError(f"--data.augment: policy '{value}' is not known: give {', '.join(get_args(PolicyName))}")
        return name, value
    return name, _numbers(switch, name, value)


def _numbers(switch: str, name: str, value: str) -> float | tuple[float, float]:
    low, high = _LIMITS[name]
    kind, many = int if name in _COUNTS else float, name in _RANGES
    shape = "LOW:HIGH" if many else "one number" if kind is float else "a whole number"
    wrong = UserError(f"--data.augment: {switch}={value} is not {shape} from {low:g} to {high:g}: mend it, or give off")
    try:
        found = [kind(part) for part in value.split(":")]
    except ValueError:
        raise wrong from None
    if len(found) != 1 + many or found != sorted(found) or not all(low <= number <= high for number in found):
        raise wrong
    return (found[0], found[1]) if many else found[0]


# Policies: the operations and magnitudes of DALI's automatic augmentations, which the DALI loader calls itself.

BINS = 31
"""Steps of every range of magnitudes."""

_AXES = ("translate_x", "translate_y", "shear_x", "shear_y", "rotate")
_ENHANCE = ("brightness", "contrast", "color", "sharpness")

POLICY_OPS: tuple[str, ...] = (*_AXES, *_ENHANCE, "posterize", "solarize", "equalize", "auto_contrast", "identity")
SIGNED_OPS = frozenset((*_AXES, *_ENHANCE))
"""Operations whose magnitude is negative half of the time."""

RAND_TRANSLATE = 100 / 224
"""RandAugment: the furthest translation, as a share of the image's side."""
TRIVIAL_TRANSLATE = 32
"""TrivialAugment: in pixels, whatever the image's size."""


def magnitude_range(policy: PolicyName, op: str, image_size: int) -> tuple[float, float]:
    """(first, last) of an operation's BINS magnitudes: pixels, degrees, bits, a threshold, or a distance from 1."""
    wide = policy == "trivial"
    if op.startswith("translate"):
        return 0.0, TRIVIAL_TRANSLATE if wide else RAND_TRANSLATE * image_size
    if op.startswith("shear"):
        return 0.0, 0.99 if wide else 0.3
    if op == "rotate":
        return 0.0, 135.0 if wide else 30.0
    if op in _ENHANCE:
        return (0.01, 0.99) if wide else (0.0, 0.9)
    if op == "posterize":
        return 8.0, 2.0 if wide else 4.0
    return (256.0, 0.0) if op == "solarize" else (0.0, 0.0)
