"""Augmentation: what each kind does to a wave, by the clip's key."""

import itertools

import numpy as np
import pytest
from waves import RANGES, RATE, noise_like, sine

from mtl_dist.audio.augment import (
    Augmentation,
    AugmentConfig,
    amplify,
    inject_noise,
    shift_pitch,
    shift_time,
)
from mtl_dist.audio.clips import Clip
from mtl_dist.data.batches import keyed_generators


def augmentation(*kinds: str, probability: float = 1.0, **fields) -> Augmentation:
    for kind in kinds:
        fields |= {f"{kind}_probability": probability} | RANGES[kind]
    return Augmentation(AugmentConfig(**fields), RATE)


def loudest_hertz(wave: np.ndarray) -> float:
    """Frequency of the largest peak of a finely sampled spectrum."""
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 2**20))
    return float(spectrum.argmax() * RATE / 2**20)


@pytest.mark.parametrize("level", [0.01, 1.0])
@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 12.5])
def test_injected_noise_has_the_snr(snr_db, level):
    clean = sine(440, 8000, level)
    mix = inject_noise(clean, noise_like(8000), snr_db).astype(np.float64)
    # the sine and the noise are as good as orthogonal: the mix's share along the sine is the clean part
    clean = clean.astype(np.float64) * (mix @ clean) / (clean @ clean.astype(np.float64))
    snr = 10 * np.log10(np.sum(clean**2) / np.sum((mix - clean) ** 2))
    assert snr == pytest.approx(snr_db, abs=0.3)


@pytest.mark.parametrize("semitones", [-12.0, -2.0, -0.5, 0.0, 1.5, 7.0])
@pytest.mark.parametrize("hertz", [220.0, 1500.0])
def test_a_sines_pitch_moves_by_the_ratio_and_its_level_stays(hertz, semitones):
    wave = sine(hertz, 2 * RATE)
    shifted = shift_pitch(wave, RATE, semitones)
    cents = 1200 * np.log2(loudest_hertz(shifted) / hertz)
    assert cents == pytest.approx(100 * semitones, abs=1.0)
    middle = slice(RATE // 2, -RATE // 2)
    loudness = np.sqrt(np.mean(shifted[middle] ** 2) / np.mean(wave[middle] ** 2))
    assert 0.8 < loudness < 1.05


def test_pitch_shifting_keeps_where_a_sound_is():
    """It is no change of speed: a tone from 0.5 to 1.5 s stays there."""
    wave = sine(600, 2 * RATE)
    wave[: RATE // 2] = wave[-RATE // 2 :] = 0
    for semitones in (-3.0, 3.0):
        energy = np.cumsum(shift_pitch(wave, RATE, semitones).astype(np.float64) ** 2)
        first, last = np.searchsorted(energy, [0.02 * energy[-1], 0.98 * energy[-1]]) / RATE
        assert (first, last) == pytest.approx((0.5, 1.5), abs=0.1)


@pytest.mark.parametrize("gain_db", [-20.0, -6.0, 0.0, 3.0])
def test_gain_is_in_decibels(gain_db):
    wave = noise_like(1000)
    decibels = 20 * np.log10(np.abs(amplify(wave, gain_db) / wave))
    np.testing.assert_allclose(decibels, gain_db, atol=1e-4)


def test_gain_ends_at_full_scale_without_clipping():
    wave = noise_like(1000)
    louder = amplify(wave, 60.0)
    assert np.abs(louder).max() == 1.0
    np.testing.assert_allclose(louder / wave, louder[0] / wave[0], rtol=1e-5)


@pytest.mark.parametrize("samples", [-100, -99, -7, 0, 1, 42, 100])
def test_a_time_shift_is_numpys_roll_with_zeros_moving_in(samples):
    wave = noise_like(100)
    wanted = np.roll(wave, samples)
    if samples > 0:
        wanted[:samples] = 0
    elif samples < 0:
        wanted[samples:] = 0
    np.testing.assert_array_equal(shift_time(wave, samples), wanted)


@pytest.mark.parametrize("kinds", [*[(k,) for k in RANGES], tuple(RANGES)], ids="+".join)
@pytest.mark.parametrize("samples", [1, 2, 50, 3000])
@pytest.mark.parametrize("level", [0.0, 1e-30, 1.0])
def test_any_clip_stays_float32_of_its_length_within_full_scale(kinds, samples, level):
    wave = np.full(samples, level, np.float32)
    wave[1::3] *= -1
    augment = augmentation(*kinds)
    with np.errstate(all="raise", under="ignore"):
        found = augment(Clip(id="a", wave=wave.copy(), label=3), keyed_generators(0, "t", 0))
    assert (found.id, found.label, found.split) == ("a", 3, "train")
    assert (found.wave.dtype, found.wave.shape) == (np.float32, wave.shape)
    assert np.isfinite(found.wave).all()
    assert np.abs(found.wave).max() <= 1.0
    if level == 0.0:
        assert not found.wave.any()


def test_an_absent_clip_stays_absent():
    clip = Clip(id="a", wave=np.zeros(0, np.float32))
    assert augmentation(*RANGES)(clip, None) is clip


@pytest.mark.parametrize("kind", RANGES)
def test_a_clip_changes_by_its_key_and_never_in_place(kind):
    wave = noise_like(3000)
    augment = augmentation(kind)

    def changed(name: str, epoch: int = 0) -> np.ndarray:
        return augment(Clip(id=name, wave=wave), keyed_generators(0, "task", epoch)).wave

    first = changed("a")
    np.testing.assert_array_equal(wave, noise_like(3000))
    assert not np.array_equal(first, wave)
    np.testing.assert_array_equal(changed("a"), first)
    assert not np.array_equal(changed("b"), first)
    assert not np.array_equal(changed("a", epoch=1), first)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_switching_one_kind_on_moves_the_draws_of_no_other(number):
    """Several at once are each of them alone, one after the other, to the bit."""
    keyed = keyed_generators(7, "task", 2)
    for kinds in itertools.combinations(RANGES, number):
        clip = Clip(id="a", wave=noise_like(3000))
        together = augmentation(*kinds, probability=0.8)(clip, keyed)
        for kind in ("pitch", "shift", "noise", "gain"):
            if kind in kinds:
                clip = augmentation(kind, probability=0.8)(clip, keyed)
        np.testing.assert_array_equal(together.wave, clip.wave)


def test_the_share_of_changed_clips_is_the_probability_and_does_not_move_how_much():
    wave = sine(300, 200)
    clips = [Clip(id=str(i), wave=wave) for i in range(400)]
    keyed = keyed_generators(0, "task", 0)
    some, every = augmentation("gain", probability=0.3), augmentation("gain")
    changed = 0
    for clip in clips:
        found = some(clip, keyed).wave
        if not np.array_equal(found, wave):
            changed += 1
            np.testing.assert_array_equal(found, every(clip, keyed).wave)
    assert 80 < changed < 160  # 120 expected, standard deviation 9


def test_a_short_clip_keeps_at_least_half_of_itself():
    config = AugmentConfig(shift_seconds=(-0.5, 0.5), shift_probability=1.0)
    augment = Augmentation(config, RATE)
    kept = [
        np.count_nonzero(
            augment(
                Clip(id=str(i), wave=np.ones(100, np.float32)), keyed_generators(0, "t", 0)
            ).wave
        )
        for i in range(200)
    ]
    assert 50 <= min(kept) < 55
    assert len(set(kept)) > 30
