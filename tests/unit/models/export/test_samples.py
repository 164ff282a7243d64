import numpy as np

from models.export import samples


def test_classes_take_turns_until_they_have_no_more():
    labels = [0, 0, 0, 1, 2, 2]
    assert samples.round_robin(labels, 10) == [0, 3, 4, 1, 5, 2]
    assert samples.round_robin(labels, 4) == [0, 3, 4, 1]
    assert samples.round_robin([], 4) == []


def test_stratified_samples_come_with_their_own_pixels(splits):
    chosen = samples.stratified(splits["support"], 4)
    assert [sample.label for sample in chosen] == [0, 1, 2, 0]
    assert chosen[3].name == "käse/1.jpg"
    assert chosen[3].pixels.shape == (33, 21, 3)
    whole = {sample.name: sample.pixels for sample in samples.stream(splits["support"])}
    assert len(whole) == 24
    for sample in chosen:
        assert np.array_equal(whole[sample.name], sample.pixels)


def test_calibration_draws_on_labelled_and_unlabelled_images(splits):
    assert len(samples.calibration(splits["support"], None, 100)) == 24
    assert len(samples.calibration(splits["support"], splits["unlabelled"], 10)) == 10
    assert len(samples.calibration(splits["support"], splits["unlabelled"], 1000)) == 24 + 18


def test_calibration_passes_over_what_is_left_out(splits):
    labelled = [sample.pixels for sample in samples.stream(splits["support"])]
    unlabelled = [sample.pixels for sample in samples.stream(splits["unlabelled"])]
    left_out = [0, 5, 23, 24, 41]  # three labelled images, the first and the last unlabelled one
    drawn = samples.calibration(splits["support"], splits["unlabelled"], 1000, left_out)
    wanted = [pixels for at, pixels in enumerate([*labelled, *unlabelled]) if at not in left_out]
    assert sorted(pixels.tobytes() for pixels in drawn) == sorted(pixels.tobytes() for pixels in wanted)
    assert len(samples.calibration(None, splits["unlabelled"], 1000, [0, 17])) == 16


def test_large_images_are_shrunk_and_keep_their_shape():
    large = samples.Sample("a", 0, np.zeros((300, 600, 3), dtype=np.uint8))
    assert samples.shrunk(large, 256).pixels.shape == (128, 256, 3)
    small = samples.Sample("a", 0, np.ones((30, 60, 3), dtype=np.uint8))
    assert np.array_equal(samples.shrunk(small, 256).pixels, small.pixels)
