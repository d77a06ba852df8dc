"""How a weight is stored: its scheme, and the bytes it takes in each format that can hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from models.calls import ModelError, nearest

_FLOAT_BITS = 32


@dataclass(frozen=True)
class Code:
    """A code of fixed length: `weights` values of up to `levels` levels take `bits` bits."""

    levels: int
    weights: int
    bits: int


#: `5-trit` packs five ternary digits into a byte (3**5 = 243), `base-9` five base-9 digits into
#: two (9**5 = 59,049).
CODES = {
    "1-bit": Code(levels=2, weights=1, bits=1),
    "2-bit": Code(levels=4, weights=1, bits=2),
    "3-bit": Code(levels=8, weights=1, bits=3),
    "4-bit": Code(levels=16, weights=1, bits=4),
    "5-trit": Code(levels=3, weights=5, bits=8),
    "base-9": Code(levels=9, weights=5, bits=16),
}

#: All formats. A weight is stored by default in the smallest that can hold it, the earlier of two
#: of the same size: a frozen weight is regenerated from its seed.
FORMATS = ("seed", *CODES, "patterns", "float32")

#: Forms of the values that no code holds: of weights that are any float, biases and norms.
FloatFormat = Literal["float32", "float16"]


@dataclass(frozen=True)
class Storage:
    """The stored form of one layer's weight.

    `count` is the number of stored weights: pre-defined zeros are not stored. `levels` is the
    number of values that a weight can take up to its scale, None for any float. `scales` is the
    number of float32 scales beside the codes, `bank_bits` what the description of a mask takes. A
    `frozen` weight is never learned; `code_bits` is what its pattern codes take in all, None where
    it has none.
    """

    scheme: str
    count: int
    levels: int | None = None
    scales: int = 0
    bank_bits: int = 0
    frozen: bool = False
    code_bits: int | None = None

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that can hold the weight, by size; the first is the default one."""
        possible = [name for name in FORMATS if self._fits(name)]
        return tuple(sorted(possible, key=self.stored_bytes))

    @property
    def published_format(self) -> str:
        """The format in which papers count the weight: codes of whole bits, else the default."""
        whole_bits = [name for name, code in CODES.items() if code.weights == 1]
        fitting = [name for name in whole_bits if self._fits(name)]
        return self.formats[0] if self.frozen or not fitting else fitting[0]

    def bits(self, format: str | None = None) -> float:
        """Return the bits of the codes, or of the floats, without filling anything up."""
        name = self._chosen(format)
        if name == "seed":
            return 0.0
        if name == "patterns":
            return float(self.code_bits or 0)
        if name == "float32":
            return float(_FLOAT_BITS * self.count)
        return self.count * CODES[name].bits / CODES[name].weights

    def stored_bytes(self, format: str | None = None) -> int:
        """Return the bytes of the weight, its scales and its mask's description.

        Codes are filled up to whole groups and these to whole bytes; so is the description.
        """
        name = self._chosen(format)
        if name in CODES:
            groups = -(-self.count // CODES[name].weights)
            codes = -(-groups * CODES[name].bits // 8)
        else:
            codes = -(-int(self.bits(name)) // 8)
        return codes + 4 * self.scales_in(name) + -(-self.bank_bits // 8)

    def scales_in(self, format: str | None = None) -> int:
        """Return the number of float32 scales: those beside codes, not in floats themselves."""
        return self.scales if self._chosen(format) in CODES else 0

    def possible(self, format: str | None) -> str | None:
        """Return a format if it can hold the weight, else None, which means the default one."""
        check_format(format)
        return format if format in self.formats else None

    def _chosen(self, format: str | None) -> str:
        if format is None:
            return self.formats[0]
        check_format(format)
        if not self._fits(format):
            raise ModelError(
                f"{format} cannot hold {self.scheme} weights; "
                f"formats that can: {', '.join(self.formats)}"
            )
        return format

    def _fits(self, format: str) -> bool:
        if format == "seed":
            return self.frozen
        if format == "patterns":
            return self.code_bits is not None
        if format == "float32":
            return True
        return self.levels is not None and self.levels <= CODES[format].levels


def check_format(format: str | None) -> None:
    """Raise ModelError for a format that there is not; None is that of the default."""
    if format is not None and format not in FORMATS:
        raise ModelError(
            f"unknown format {format!r}{nearest(format, FORMATS)}; "
            f"known formats: {', '.join(FORMATS)}"
        )


def check_float_format(format: str) -> None:
    """Raise ModelError for a form of floats that there is not."""
    if format not in get_args(FloatFormat):
        raise ModelError(f"what has no code is stored in float32 or float16, not in {format!r}")
