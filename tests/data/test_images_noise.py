"""Noise on pictures: of the wanted strength, by the seed, still a picture; what is no picture is refused."""

import io

import numpy as np
import pytest
from PIL import Image

from mllm_srec.data.images import PictureError, add_noise, open_picture


def grey(size: tuple[int, int], kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (128, 128, 128)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_noise_has_the_deviation_and_no_direction(kind: str) -> None:
    noised = open_picture(add_noise(grey((200, 100), kind), 20.0, 1000, seed=3), 1000)
    assert (noised.mode, noised.size) == ("RGB", (200, 100))
    values = np.asarray(noised, dtype=np.float64)
    assert values.std() == pytest.approx(20.0, abs=0.5)
    assert values.mean() == pytest.approx(128.0, abs=1.0)
    neighbours = np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 0.03, "each value has noise of its own"


def test_the_seed_decides() -> None:
    data = grey((30, 20))
    assert add_noise(data, 20.0, 64, seed=1) == add_noise(data, 20.0, 64, seed=1)
    assert add_noise(data, 20.0, 64, seed=1) != add_noise(data, 20.0, 64, seed=2)


def test_without_deviation_the_pixels_stay() -> None:
    assert np.unique(np.asarray(open_picture(add_noise(grey((9, 5)), 0.0, 64, seed=1), 64))).tolist() == [128]


def test_large_pictures_are_reduced_before_and_values_stay_in_range() -> None:
    noised = open_picture(add_noise(grey((400, 100)), 500.0, 100, seed=1), 1000)
    assert noised.size == (100, 25)
    values = np.asarray(noised)
    assert 0.3 < (values == 0).mean() < 0.5 and 0.3 < (values == 255).mean() < 0.5


@pytest.mark.parametrize(("data", "state"), [(b"", "not_a_picture"), (grey((40, 40))[:-30], "truncated")])
def test_what_is_no_picture_is_refused(data: bytes, state: str) -> None:
    with pytest.raises(PictureError) as caught:
        add_noise(data, 20.0, 64, seed=1)
    assert caught.value.state == state
