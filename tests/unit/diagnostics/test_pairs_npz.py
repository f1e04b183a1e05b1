import numpy as np
import pytest
import torch

from mmscale.diagnostics.pairs import Pairs, load_npz, save_npz
from mmscale.errors import DataError
from tests.unit.diagnostics.faulty_embeddings import isotropic


def rows(num=6, width=4):
    values = np.random.default_rng(0).normal(size=(num, width))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_pairs_saved_as_npz_are_loaded_unchanged(tmp_path):
    made = isotropic(10, 8, 0)
    pairs = Pairs(
        made.image,
        made.text.repeat(2, 1),
        made.image_ids,
        made.text_ids.repeat(2),
        torch.randn(10, 3),
        torch.randn(20, 5),
        14.5,
    )
    path = tmp_path / "embedded"
    save_npz(path, pairs)
    loaded = load_npz(path)
    for name, value in vars(pairs).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(loaded, name), value)
        else:
            assert getattr(loaded, name) == value


def test_without_ids_row_i_is_paired_with_row_i(tmp_path):
    loaded = load_npz(write(tmp_path / "a.npz", image=rows(), text=rows()))
    assert loaded.image_ids.tolist() == loaded.text_ids.tolist() == list(range(6))


@pytest.mark.parametrize("name", ["image_ids", "text_ids"])
def test_one_array_of_ids_is_used_for_images_and_texts(tmp_path, name):
    ids = np.array([3, 3, 4, 5, 6, 7])
    loaded = load_npz(write(tmp_path / "a.npz", image=rows(), text=rows(), **{name: ids}))
    assert loaded.image_ids.tolist() == loaded.text_ids.tolist() == ids.tolist()


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-3, 7.0])
def test_rows_that_are_not_unit_are_normalised_aloud(tmp_path, caplog, kind, scale):
    image = (rows() * scale).astype(kind)
    loaded = load_npz(write(tmp_path / "a.npz", image=image, text=rows()))
    assert "6 of 6 rows of `image` are not unit rows" in caplog.text
    assert torch.allclose(loaded.image.norm(dim=1), torch.ones(6))
    assert torch.allclose(loaded.image, torch.from_numpy(rows()), atol=2e-3)


def test_unit_rows_are_loaded_without_a_warning(tmp_path, caplog):
    load_npz(write(tmp_path / "a.npz", image=rows().astype(np.float16), text=rows()))
    assert not caplog.text


def test_an_array_of_zeros_is_loaded_with_a_warning(tmp_path, caplog):
    loaded = load_npz(write(tmp_path / "a.npz", image=np.zeros((6, 4)), text=rows()))
    assert "6 are zeros" in caplog.text
    assert not loaded.image.any()


@pytest.mark.parametrize("zeros", [[4], [0, 2, 5]])
def test_some_rows_of_zeros_are_named(tmp_path, zeros):
    image = rows()
    image[zeros] = 0.0
    told = ", ".join(map(str, zeros))
    with pytest.raises(
        DataError, match=rf"{len(zeros)} rows? \({told}\) of `image` holds? only zeros"
    ):
        load_npz(write(tmp_path / "a.npz", image=image, text=rows()))


@pytest.mark.parametrize("kind", ["U", "S"])
def test_ids_may_be_names_of_files(tmp_path, kind):
    names = np.array(["b.jpg", "a.jpg", "c/ü.jpg" if kind == "U" else "c.jpg"]).astype(kind)
    five = np.repeat(names[::-1], 2)
    path = write(tmp_path / "a.npz", image=rows(3), text=rows(6), image_ids=names, text_ids=five)
    pairs = load_npz(path)
    owners = [names[pairs.image_ids.tolist().index(owner)] for owner in pairs.text_ids.tolist()]
    assert owners == five.tolist()
    assert len(set(pairs.image_ids.tolist())) == 3


def test_names_and_numbers_do_not_mix(tmp_path):
    path = write(
        tmp_path / "a.npz",
        image=rows(),
        text=rows(),
        image_ids=np.arange(6),
        text_ids=np.arange(6).astype(str),
    )
    with pytest.raises(DataError, match="the other integers"):
        load_npz(path)


@pytest.mark.parametrize("new", [True, False])
def test_a_torch_file_is_refused_pointing_to_np_savez(tmp_path, new):
    path = tmp_path / "pairs.npz"
    content = {"image": torch.tensor(rows()), "text": torch.tensor(rows())}
    torch.save(content, path, _use_new_zipfile_serialization=new)
    with pytest.raises(DataError, match="torch file") as caught:
        load_npz(path)
    assert "np.savez" in str(caught.value)


def with_nan():
    image = rows()
    image[4, 1] = np.nan
    return image


BAD = {
    "no array `text`": {"image": rows()},
    "the first is row 4": {"image": with_nan(), "text": rows()},
    "must be a matrix of floats": {"image": np.ones((6, 4), dtype=np.int64), "text": rows()},
    "of shape \\(0, 4\\)": {"image": rows(0), "text": rows(0)},
    "6 image rows and 12 text rows need both": {"image": rows(), "text": rows(12)},
    "6 wide and text rows 4": {"image": rows(6, 6), "text": rows()},
    "one integer or text for each of the 6 rows": {
        "image": rows(),
        "text": rows(),
        "image_ids": np.ones(6),
    },
    "outside \\[0, 2\\^63\\)": {"image": rows(), "text": rows(), "image_ids": np.arange(6) - 1},
    "no row has a partner": {
        "image": rows(),
        "text": rows(),
        "image_ids": np.arange(6),
        "text_ids": np.arange(6) + 10,
    },
    "`backbone_text` has 5 rows": {"image": rows(), "text": rows(), "backbone_text": rows(5)},
    "`logit_scale` must be": {"image": rows(), "text": rows(), "logit_scale": np.array(-1.0)},
    "not an npz of plain arrays": {
        "image": np.array([{}], dtype=object),
        "text": rows(),
    },
}


@pytest.mark.parametrize(("fault", "arrays"), BAD.items(), ids=BAD)
def test_faults_are_named_with_the_file(tmp_path, fault, arrays):
    path = write(tmp_path / "broken.npz", **arrays)
    with pytest.raises(DataError, match=fault) as caught:
        load_npz(path)
    assert str(path) in str(caught.value)


def truncated(folder):
    whole = write(folder / "whole.npz", image=rows(200), text=rows(200)).read_bytes()
    return whole[: len(whole) // 2]


def damaged(folder):
    whole = bytearray(write(folder / "whole.npz", image=rows(200), text=rows(200)).read_bytes())
    whole[500:520] = bytes(20)
    return bytes(whole)


@pytest.mark.parametrize(
    "content",
    [lambda _: b"", lambda _: b"image,text", truncated, damaged],
    ids=["empty", "text", "truncated", "damaged"],
)
def test_what_is_no_npz_is_refused(tmp_path, content):
    path = tmp_path / "broken.npz"
    path.write_bytes(content(tmp_path))
    with pytest.raises(DataError, match=r"broken\.npz"):
        load_npz(path)


def test_load_npz_refuses_a_missing_file_a_folder_and_a_single_array(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load_npz(tmp_path / "absent.npz")
    with pytest.raises(DataError, match="cannot be read"):
        load_npz(tmp_path)
    np.save(tmp_path / "one.npy", rows())
    with pytest.raises(DataError, match="single array"):
        load_npz(tmp_path / "one.npy")
