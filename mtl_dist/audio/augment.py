"""Augmentation of training crops: pitch shifting, time shift, noise injection, gain; each off until it is given a range.

Paper section 5.3 and Table 2 (rows NI, PS, PS + MTL100) name "noise injection, and pitch shifting [35, 42, 44]" and no
ranges; gain and time shift are additions. Pure functions from wave to wave, (T,) float32 in [-1, 1] in and out, and
`Augmentation`, which applies them in the order above: so the noise also fills what the shift left empty, as a
recording's would, and the gain is that of the whole recording. Tested by tests/test_augment.py, test_augmented_stream.py.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from mtl_dist.audio.clips import Clip
from mtl_dist.audio.reading import fix_length
from mtl_dist.audio.transforms import mix_at_snr, peak
from mtl_dist.sections import check

WINDOW = 2048
"""Samples of the pitch shifter's Fourier window, librosa's default; shorter clips are padded to it for the while."""


@dataclasses.dataclass(kw_only=True)
class AugmentConfig:
    """Augmentation of training crops (paper section 5.3, Table 2), each kind off while its range is null."""

    noise_snr_db: tuple[float, float] | None = None
    """Noise injection: lowest and highest signal-to-noise ratio in dB; null for none."""
    noise: str | None = None
    """Name of the corpus (section `corpora`) of background recordings to inject; null for white noise."""
    noise_probability: float = 0.5
    """Share of the clips that get noise; the others stay as they are."""
    pitch_semitones: tuple[float, float] | None = None
    """Pitch shifting: lowest and highest shift in semitones, at the same duration; null for none."""
    pitch_probability: float = 0.5
    """Share of the clips whose pitch is shifted."""
    gain_db: tuple[float, float] | None = None
    """Gain: lowest and highest in dB; it ends at full scale, where data.normalise peak starts. Null for none."""
    gain_probability: float = 0.5
    """Share of the clips whose level is changed."""
    shift_seconds: tuple[float, float] | None = None
    """Time shift: earliest (negative) and latest in seconds, zeros moving in; a short clip's is at most half of it."""
    shift_probability: float = 0.5
    """Share of the clips that are shifted in time."""

    def __post_init__(self):
        for name, most in (
            ("noise_snr_db", 100.0),
            ("pitch_semitones", 24.0),
            ("gain_db", 100.0),
            ("shift_seconds", 3600.0),
        ):
            span = getattr(self, name)
            fits = span is None or -most <= span[0] <= span[1] <= most
            what = f"[lowest, highest] within -{most:g} to {most:g}, or null"
            check(f"augment.{name}", span, fits, what)
        for kind in ("noise", "pitch", "gain", "shift"):
            share = getattr(self, f"{kind}_probability")
            check(f"augment.{kind}_probability", share, 0 <= share <= 1, "0 to 1")
        heard = self.noise is None or self.noise_snr_db is not None
        check("augment.noise", self.noise, heard, "it together with augment.noise_snr_db")


def inject_noise(wave: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Add `noise` at a signal-to-noise ratio; both are made quieter where the sum would leave [-1, 1]."""
    return mix_at_snr(wave, noise, snr_db)[0]


def shift_pitch(wave: np.ndarray, rate: int, semitones: float) -> np.ndarray:
    """Multiply all frequencies by 2^(semitones / 12) at the same length, by librosa's phase vocoder."""
    from librosa.effects import pitch_shift  # seconds, which only those who shift pitch should wait

    padded = fix_length(wave, max(len(wave), WINDOW))
    shifted = pitch_shift(padded, sr=rate, n_steps=semitones, n_fft=WINDOW)
    return _within_full_scale(fix_length(shifted, len(wave)))


def amplify(wave: np.ndarray, gain_db: float) -> np.ndarray:
    """Multiply by 10^(gain_db / 20), or by less where the peak would leave [-1, 1]: nothing is clipped."""
    return _within_full_scale(wave * np.float32(10.0 ** (gain_db / 20.0)))


def shift_time(wave: np.ndarray, samples: int) -> np.ndarray:
    """Move (T,) later by `samples` (earlier if negative); zeros move in, what leaves is lost."""
    shifted = np.zeros_like(wave)
    if samples >= 0:
        shifted[samples:] = wave[: len(wave) - samples]
    else:
        shifted[:samples] = wave[-samples:]
    return shifted


def _within_full_scale(wave: np.ndarray) -> np.ndarray:
    return wave / np.float32(max(1.0, peak(wave)))


class Augmentation:
    """Changes clips as an AugmentConfig says.

    Every kind draws from a generator of its own, keyed(clip id, "augment KIND"): first whether, then how much, then the
    noise. So neither switching one on nor its probability moves any other draw.
    """

    def __init__(self, config: AugmentConfig, rate: int):
        self.config, self.rate = config, rate
        kinds = {
            "pitch": (config.pitch_semitones, config.pitch_probability, self._pitch),
            "shift": (config.shift_seconds, config.shift_probability, self._shift),
            "noise": (config.noise_snr_db, config.noise_probability, self._noise),
            "gain": (config.gain_db, config.gain_probability, self._gain),
        }
        self.kinds = {kind: how for kind, how in kinds.items() if how[0] is not None}
        if (
            "pitch" in self.kinds
        ):  # librosa compiles for seconds: now, not in each worker's first round
            shift_pitch(np.zeros(1, np.float32), rate, 1.0)

    def __call__(self, clip: Clip, keyed: Callable[..., np.random.Generator]) -> Clip:
        """Return the clip, changed, of the same length; an absent clip stays absent.

        Raises:
            BadClipError: the background recording beside the clip cannot be read.
        """
        for kind, (span, probability, change) in self.kinds.items() if len(clip.wave) else ():
            draw = keyed(clip.id, f"augment {kind}")
            if draw.random() < probability:
                wave = change(clip, draw.uniform(*span), draw)
                clip = dataclasses.replace(clip, wave=wave)
        return clip

    def _pitch(self, clip: Clip, semitones: float, draw: np.random.Generator) -> np.ndarray:
        return shift_pitch(clip.wave, self.rate, semitones)

    def _shift(self, clip: Clip, seconds: float, draw: np.random.Generator) -> np.ndarray:
        """Shift by `seconds`, in proportion less where the range would move out more than half of a short clip."""
        longest = max(map(abs, self.config.shift_seconds)) * self.rate
        share = min(1.0, len(clip.wave) / 2 / longest) if longest else 1.0
        return shift_time(clip.wave, int(seconds * self.rate * share))

    def _noise(self, clip: Clip, snr_db: float, draw: np.random.Generator) -> np.ndarray:
        if self.config.noise is None:
            noise = draw.standard_normal(len(clip.wave), dtype=np.float32)
        else:
            noise = clip.backgrounds[self.config.noise].cut(len(clip.wave), draw)
        return inject_noise(clip.wave, noise, snr_db)

    def _gain(self, clip: Clip, gain_db: float, draw: np.random.Generator) -> np.ndarray:
        return amplify(clip.wave, gain_db)
