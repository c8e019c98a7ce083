from linvis.datasets.integrity import find_damage, find_label_fault, find_picture_fault


def test_good_pictures_have_no_fault(good_file):
    assert find_damage(good_file.read_bytes()) is None
    assert find_picture_fault(good_file.read_bytes()) is None


def test_bad_pictures_have_the_right_fault(bad_file):
    path, reason = bad_file
    assert reason in find_picture_fault(path.read_bytes())


def test_jpeg_cut_anywhere_is_truncated(picture_bytes):
    data = picture_bytes()
    assert all('truncated' in find_damage(data[:end]) for end in range(2, len(data)))


def test_label_map_within_range_has_no_fault(label_bytes):
    assert find_label_fault(label_bytes(150), max_label=150) is None


def test_label_map_beyond_range_names_the_label(label_bytes):
    assert 'this map has 151' in find_label_fault(label_bytes(151), max_label=150)


def test_label_map_without_range_allows_ignored_label(label_bytes):
    assert find_label_fault(label_bytes(255)) is None


def test_label_map_of_colours_names_the_mode(picture_bytes):
    assert 'RGB' in find_label_fault(picture_bytes(kind='PNG'))


def test_label_map_of_sixteen_bits_names_the_mode(picture_bytes):
    assert 'I;16' in find_label_fault(picture_bytes('I;16', 'PNG'))


def test_label_map_that_is_no_picture_has_a_fault():
    assert 'Pillow cannot decode' in find_label_fault(b'<html>')


def test_label_map_truncated_has_a_fault(label_bytes):
    assert 'truncated' in find_label_fault(label_bytes()[:-20])
