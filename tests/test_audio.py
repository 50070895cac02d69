"""Reading, trimming, normalising and mixing audio against librosa, soundfile and brute force."""

import io

import librosa
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_dist.audio.clips import Background, ClipReader, Row
from mtl_dist.audio.reading import (
    BadClipError,
    fix_length,
    open_clip,
    read_frames,
    read_stretch,
    sounding_span,
)
from mtl_dist.audio.transforms import hold_samples, mix_at_snr, peak_normalise, tile_to

RATE = 16_000


def noise(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * rate)).astype(np.float32)


def as_audio(wave: np.ndarray, rate: int, form: str = "WAV", subtype: str = "FLOAT") -> dict:
    """Encode a wave as {"path", "bytes"}, as a corpus of bytes has it."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, subtype, format=form)
    return {"path": None, "bytes": buffer.getvalue()}


def as_row(audio: dict, **more) -> Row:
    return Row(id="c", audio=audio, label=3, **more)


@pytest.mark.parametrize("rate", [44_100, 48_000, 22_050, 8_000, 192_000, 16_000])
@pytest.mark.parametrize("offset", [0, 137], ids=["on the grid", "off the grid"])
def test_a_stretch_is_a_cut_out_of_the_whole_file_resampled_by_librosa(rate, offset):
    """Off the grid of the two rates' common periods, sample 0 of the truth is the offset itself."""
    wave = noise(1.0, rate)
    period = rate // np.gcd(rate, RATE)
    start = period * round(0.3 * rate / period) + offset % period
    frames = round(0.25 * rate)
    with open_clip(as_audio(wave, rate)) as file:
        found = read_stretch(file, start, frames, RATE)
    phase = start % period
    whole = librosa.resample(wave[phase:], orig_sr=rate, target_sr=RATE, res_type="soxr_hq")
    first = (start - phase) * RATE // rate
    assert found.shape == (4000,)
    np.testing.assert_allclose(found, whole[first : first + 4000], atol=1e-4)


def test_a_whole_file_read_as_one_stretch_is_librosas_resampling_to_its_edges():
    wave = noise(0.37, 44_100)
    with open_clip(as_audio(wave, 44_100)) as file:
        found = read_stretch(file, 0, file.frames, RATE)
    truth = librosa.resample(wave, orig_sr=44_100, target_sr=RATE, res_type="soxr_hq")
    np.testing.assert_allclose(found[: len(truth)], truth[: len(found)], atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_channels_are_averaged(channels):
    waves = np.stack([noise(0.1, 48_000, seed) for seed in range(channels)], axis=1)
    with open_clip(as_audio(waves, 48_000)) as file:
        found = read_frames(file, 100, 1000)
    np.testing.assert_allclose(found, waves[100:1100].mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("form", ["WAV", "FLAC"])
def test_path_and_bytes_give_the_samples_that_soundfile_gives(tmp_path, form):
    audio = as_audio(noise(0.1, RATE), RATE, form, "PCM_16")
    path = tmp_path / f"clip.{form.lower()}"
    path.write_bytes(audio["bytes"])
    truth, _ = soundfile.read(path, dtype="float32")
    for source in (audio, {"path": str(path), "bytes": None}):
        with open_clip(source) as file:
            np.testing.assert_array_equal(read_stretch(file, 50, 500, RATE), truth[50:550])


@pytest.mark.parametrize("excess", [1, 44, 45])
def test_a_wav_size_too_large_by_the_header_is_read_and_by_more_than_a_hundredth_is_not(excess):
    """Many recorders count the header as sound; what was cut off is refused."""
    wave = noise(0.01, RATE)
    audio = as_audio(wave, RATE, "WAV", "PCM_16")
    data = bytearray(audio["bytes"])
    place = data.index(b"data") + 4
    size = int.from_bytes(data[place : place + 4], "little")
    assert size == 2 * len(wave)
    data[place : place + 4] = (size + excess).to_bytes(4, "little")
    spoilt = {"path": "x.wav", "bytes": bytes(data)}
    if excess > 44:
        with (
            pytest.raises(BadClipError, match=r"x\.wav: is truncated: 320 of 365 bytes"),
            open_clip(spoilt),
        ):
            pass
        return
    with open_clip(audio) as truth, open_clip(spoilt) as file:
        assert file.frames == len(wave)
        np.testing.assert_array_equal(
            read_frames(file, 0, len(wave)), read_frames(truth, 0, len(wave))
        )


@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_a_crop_of_a_long_file_reads_its_ends_and_the_crop_and_nothing_else(monkeypatch, rate):
    audio, taken = as_audio(noise(60.0, rate), rate, "FLAC", "PCM_16"), []
    read = soundfile.SoundFile.read

    def counted(self, frames=-1, *args, **kwargs):
        taken.append(frames)
        return read(self, frames, *args, **kwargs)

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    ClipReader().crop(as_row(audio), 8000, np.random.default_rng(0))
    assert 0.5 * rate < sum(taken) < 2.6 * rate  # at most 1 s at either end, 0.5 s and its margins


def loud_ends(wave: np.ndarray, rate: int, db: float) -> tuple[int, int]:
    """Brute force: first and last 20 ms frame, counted from the start, whose RMS is above `db` dBFS."""
    hop = round(0.02 * rate)
    rms = [np.sqrt(np.mean(wave[i : i + hop] ** 2)) for i in range(0, len(wave), hop)]
    loud = [i for i, value in enumerate(rms) if value > 10 ** (db / 20)]
    return loud[0] * hop, min(len(wave), (loud[-1] + 1) * hop)


@settings(max_examples=30, deadline=None)
@given(
    before=st.floats(0, 2.5),
    sound=st.floats(0.001, 1.5),
    after=st.floats(0, 2.5),
    rate=st.sampled_from([8000, 16_000, 44_100]),
)
def test_the_sounding_span_is_the_brute_force_one(before, sound, after, rate):
    quiet = [noise(seconds, rate) * 1e-4 for seconds in (before, after)]
    wave = np.concatenate([quiet[0], noise(max(sound, 2 / rate), rate, 1), quiet[1]])
    with open_clip(as_audio(wave, rate)) as file:
        assert sounding_span(file, -60.0) == loud_ends(wave.astype(np.float64), rate, -60.0)


@pytest.mark.parametrize("samples", [1, 100, 40_000])
def test_a_silent_clip_is_kept_whole_and_divides_by_nothing(samples):
    row = as_row(as_audio(np.zeros(samples, np.float32), RATE))
    with open_clip(row.audio) as file:
        assert sounding_span(file, -60.0) == (0, samples)
    with np.errstate(all="raise"):
        clip = ClipReader().crop(row, 32_000, np.random.default_rng(0))
    assert len(clip.wave) == min(samples, 32_000)
    assert not clip.wave.any()


def test_peak_normalising_scales_to_one_and_leaves_silence_quiet():
    wave = noise(0.1, RATE) * 0.01
    loud = peak_normalise(wave)
    assert np.abs(loud).max() == pytest.approx(1.0)
    np.testing.assert_allclose(loud / loud[0], wave / wave[0], rtol=1e-5)
    assert np.abs(peak_normalise(wave * 1e-6)).max() < 0.01
    assert peak_normalise(np.zeros(0, np.float32)).shape == (0,)


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 10.0, 15.0])
@pytest.mark.parametrize("level", [0.01, 1.0])
def test_the_snr_of_a_mix_is_the_one_asked_for(snr_db, level):
    noisy, clean = mix_at_snr(noise(0.5, RATE) * 2 * level, noise(0.5, RATE, 1) * 0.03, snr_db)
    added = (noisy - clean).astype(np.float64)
    measured = 10 * np.log10(np.mean(clean.astype(np.float64) ** 2) / np.mean(added**2))
    assert measured == pytest.approx(snr_db, abs=1e-2)
    assert np.abs(noisy).max() <= 1.0 + 1e-6


def test_mixing_with_silence_adds_nothing():
    wave, silence = noise(0.1, RATE), np.zeros(1600, np.float32)
    for clean, background in ((wave, silence), (silence, wave), (silence, silence)):
        with np.errstate(all="raise"):
            noisy, target = mix_at_snr(clean, background, 10.0)
        np.testing.assert_array_equal(noisy, clean)
        np.testing.assert_array_equal(target, clean)


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 1001, 32_000])
def test_holding_samples_is_librosas_resampling_with_every_sample_repeated(samples):
    wave = noise(2.0, RATE)[:samples]
    held = hold_samples(wave, RATE, 4000)
    low = librosa.resample(wave, orig_sr=RATE, target_sr=4000, res_type="soxr_hq", fix=False)
    assert held.shape == wave.shape
    truth = fix_length(np.repeat(low, 4), samples)
    np.testing.assert_allclose(held, truth, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    rate=st.sampled_from([8000, 11_025, 22_050, 44_100, 48_000, 96_000, 12_347]),
    frames=st.integers(1, 3000),
    samples=st.integers(1, 2000),
)
def test_a_crop_has_the_asked_length_or_that_of_the_clip_at_the_new_rate(rate, frames, samples):
    row = as_row(as_audio(np.full(frames, 0.5, np.float32), rate))
    wave = ClipReader().crop(row, samples, np.random.default_rng(0)).wave
    assert len(wave) == min(samples, max(1, round(frames * RATE / rate)))
    assert wave.dtype == np.float32


def test_crops_begin_evenly_all_over_the_sounding_part():
    """A ramp tells where a crop began: 2,000 draws fill ten equal parts of all possible beginnings."""
    ramp = np.linspace(0.1, 0.9, 1600, dtype=np.float32)
    wave = np.concatenate([np.zeros(640, np.float32), ramp, np.zeros(960, np.float32)])
    row, reader = as_row(as_audio(wave, RATE)), ClipReader(peak=False)
    generator = np.random.default_rng(0)
    begins = [reader.crop(row, 600, generator).wave[0] for _ in range(2000)]
    counts, _ = np.histogram(begins, bins=10, range=(0.1, ramp[1000]))
    assert counts.sum() == 2000
    assert counts.min() > 150
    assert counts.max() < 250


@settings(max_examples=40, deadline=None)
@given(frames=st.integers(1, 9000), rate=st.sampled_from([RATE, 44_100]))
def test_windows_lie_side_by_side_and_leave_less_than_half_a_window(frames, rate):
    samples = 1000
    row = as_row(as_audio(np.full(frames, 0.5, np.float32), rate))
    clips = ClipReader().windows(row, samples)
    lengths = [len(clip.wave) for clip in clips]
    total = frames * RATE / rate
    assert lengths[:-1] == [samples] * (len(lengths) - 1)
    assert len(lengths) == max(1, int(total / samples + 0.5)) or abs(total % samples - 500) < 2
    assert {clip.label for clip in clips} == {3}


def test_windows_are_the_clip_itself():
    wave = noise(0.3, RATE)
    clips = ClipReader(peak=False).windows(as_row(as_audio(wave, RATE)), 1000)
    np.testing.assert_array_equal(np.concatenate([clip.wave for clip in clips]), wave)


def test_tiling_repeats_to_the_asked_length():
    assert tile_to(np.array([1.0, 2.0, 3.0]), 7).tolist() == [1, 2, 3, 1, 2, 3, 1]


def test_a_bad_clip_of_bytes_is_named_by_its_path():
    audio = as_audio(np.array([0.1, np.nan], np.float32), RATE) | {"path": "talk/7.wav"}
    with pytest.raises(BadClipError, match=r"talk/7\.wav: has NaN or Inf"):
        ClipReader().crop(as_row(audio), 100, np.random.default_rng(0))


def test_noise_is_a_stretch_of_its_share_of_the_recording_from_every_place():
    """A ramp tells what was heard: 300 cuts lie within the share, reach both its ends, and are the samples themselves."""
    ramp = np.linspace(0, 0.9, 10_000, dtype=np.float32)
    background = Background(as_row(as_audio(ramp, RATE), span=(0.25, 0.75)), RATE)
    generator, begins = np.random.default_rng(0), []
    for _ in range(300):
        noise = background.cut(100, generator)
        begins.append(int(np.searchsorted(ramp, noise[0])))
        np.testing.assert_array_equal(noise, ramp[begins[-1] : begins[-1] + 100])
    assert 2500 <= min(begins) < 2600
    assert 7300 < max(begins) <= 7400


@pytest.mark.parametrize("samples", [1, 100, 250, 1000])
def test_noise_longer_than_its_share_of_the_recording_is_repeated(samples):
    wave = noise(1000 / RATE, RATE)
    background = Background(as_row(as_audio(wave, RATE), span=(0.9, 1.0)), RATE)
    cut = background.cut(samples, np.random.default_rng(0))
    assert cut.shape == (samples,)
    if samples >= 100:
        np.testing.assert_array_equal(cut, np.resize(wave[900:], samples))
    assert np.isin(cut, wave[900:]).all()
