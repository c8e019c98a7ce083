"""The generated page and its pictures."""

import json
from math import prod
from pathlib import Path

import pytest

from benchmarks import page, results

DOCS = Path(__file__).resolve().parents[3] / 'docs'
SHAPES = [(128, 196, 192), (16, 4096, 768), (16, 4096, 192), (1, 65536, 192)]


@pytest.fixture
def made_up(make_row, make_results):
    """Times that were never measured."""
    an_element = {
        'triton': lambda _: 1e-8,
        'sdpa_flash': lambda tokens: tokens * 1e-11,
        'copy': lambda _: 2e-9,
    }
    rows = [
        make_row(name, sizes, prod(sizes) * time(sizes[1]), pass_name=pass_name)
        for sizes in SHAPES
        for name, time in an_element.items()
        for pass_name in ('fwd', 'bwd')
    ]
    rows[0] |= {'graph': False, 'note': 'it synchronises host and device'}
    identity = {k: rows[0][k] for k in results.KEYS}
    left_out = {**identity, 'impl': 'reference', 'reason': 'full', 'failed': False}
    return make_results(rows, [left_out])


@pytest.fixture
def docs(tmp_path, made_up):
    results.write(tmp_path / 'benchmarks' / 'ops_made-up.json', made_up)
    return tmp_path


def test_committed_page_is_what_the_committed_results_make():
    named_results = page.load(DOCS)
    assert (DOCS / page.PAGE).read_text() == page.page(named_results)
    pictures = {file.name for file in (DOCS / page.FOLDER).glob('ops_*.svg')}
    assert pictures == set(page.pictures(named_results))


def test_page_says_that_nothing_was_measured(make_results):
    assert page.page([('ops_x', make_results([]))]).endswith('\nNothing has been measured yet.\n')


def test_folder_without_results_is_refused(tmp_path, capsys):
    assert page.main(['--docs', str(tmp_path)]) == 1
    told = f'page.py: there are no results {tmp_path}/benchmarks/ops_*.json.\n'
    assert capsys.readouterr().err == told
    assert not list(tmp_path.iterdir())


def test_headings_name_the_file_only_where_several_have_the_operator(make_row, make_results):
    of = {name: make_row('triton', (1, 4, 8), 1.0, name=name) for name in ('bi_wkv', 'rms_norm')}
    both = [('ops_a', make_results(of.values())), ('ops_b', make_results([of['bi_wkv']]))]
    headings = [line for line in page.page(both).splitlines() if line.startswith('### ')]
    gpu = 'bfloat16, NVIDIA Stand-in 80GB HBM3'
    assert headings == [
        f'### bi_wkv, {gpu} (`ops_a`)',
        f'### bi_wkv, {gpu} (`ops_b`)',
        f'### rms_norm, {gpu}',
    ]
    titles = [figure.get_suptitle() for figure in page.pictures(both).values()]
    assert titles == [f'bi_wkv, {gpu} (ops_a)', f'rms_norm, {gpu}', f'bi_wkv, {gpu} (ops_b)']


def test_headings_of_the_committed_page_differ():
    lines = (DOCS / page.PAGE).read_text().splitlines()
    headings = [line for line in lines if line.startswith('#')]
    assert len(set(headings)) == len(headings)


def test_what_a_stopped_run_lacks_is_told(make_row, make_results):
    rows = [
        make_row('triton', (1, 4, 8), 1.0),
        make_row('copy', (1, 4, 8), 1.0),
        make_row('copy', (1, 8, 8), 2.0),
    ]
    text = page.page([('ops_x', make_results(rows, complete=False))])
    assert f'### bi_wkv, bfloat16, NVIDIA Stand-in 80GB HBM3\n\n{page.STOPPED}\n' in text
    assert '| 1 | 8 | 8 | fwd | not measured | 2.000 | not measured |' in text
    assert '|  |' not in text
    assert page.STOPPED not in page.page([('ops_x', make_results(rows))])


def test_page_has_a_table_and_a_picture(docs, capsys):
    assert page.main(['--docs', str(docs)]) == 0
    text = (docs / page.PAGE).read_text()
    rows = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('|')]
    assert rows[0] == [
        *('B', 'T', 'C', 'pass', 'triton', 'sdpa_flash', 'copy'),
        *('GB/s', 'of copy', 'MiB'),
    ]
    # 4816896 elements; 6 bytes each in 0.0482 ms
    assert rows[2] == [
        *('128', '196', '192', 'fwd', '0.0482\\*', '**0.0094**', '0.0096'),
        *('600', '60%', '12'),
    ]
    assert len(rows) == 2 + 2 * len(SHAPES)
    picture = '../benchmarks/ops_made-up_bi_wkv_bfloat16.svg'
    assert f']({picture})' in text
    assert (docs / 'ops' / picture).resolve().is_file()
    assert '* reference: full (B128-T196-C192 fwd)' in text
    assert 'commit `0123456789`' in text
    assert 'The fastest copy (`copy_`, 4 GiB) ran at 1,000 GB/s; a call' in text
    assert 'Wrote' in capsys.readouterr().out


def test_way_of_the_fastest_copy_is_told_where_it_is_known(made_up):
    made_up['header'] |= {'copy_way': 'kernel', 'copy_gib': 0.5}
    text = page.page([('ops_x', made_up)])
    assert 'The fastest copy (an element-wise kernel, 0.5 GiB) ran at 1,000 GB/s' in text


def test_older_files_that_do_not_tell_the_way_have_pages(docs):
    file = docs / 'benchmarks' / 'ops_made-up.json'
    content = json.loads(file.read_text())
    del content['header']['copies'], content['header']['copy_way']
    file.write_text(json.dumps(content))
    page.write(docs)
    assert '. The fastest copy ran at 1,000 GB/s; a call' in (docs / page.PAGE).read_text()


def test_long_lists_of_what_is_missing_are_counted(made_up):
    made_up['left_out'] *= 5
    assert '* reference: full (5 rows)' in page.page([('ops_x', made_up)])


def test_same_results_make_the_same_files_and_stale_pictures_go(docs):
    stale = docs / 'benchmarks' / 'ops_old_bi_wkv_float16.svg'
    stale.write_text('')
    first = {path: path.read_bytes() for path in page.write(docs)}
    second = {path: path.read_bytes() for path in page.write(docs)}
    assert first == second
    assert len(first) == 2
    assert not stale.exists()


def test_picture_shows_time_an_element(made_up):
    figure = page.draw(made_up['rows'], 1000.0, 'title')
    forward, backward = figure.axes
    lines = {
        line.get_label(): line for line in forward.get_lines() if line.get_linestyle() != 'None'
    }
    assert set(lines) == {'triton', 'sdpa_flash', 'least traffic,\nas a copy'}
    # 1e-8 ms is 10 ps, at every T; of two shapes with one T, the line goes through the first
    assert lines['triton'].get_xdata().tolist() == [196, 4096, 65536]
    assert lines['triton'].get_ydata() == pytest.approx([10, 10, 10])
    assert lines['sdpa_flash'].get_ydata() == pytest.approx([1.96, 40.96, 655.36])
    assert lines['least traffic,\nas a copy'].get_ydata() == pytest.approx([6, 6])  # 6 B at 1 TB/s
    assert backward.get_title() == 'bwd'
    assert forward.get_xscale() == forward.get_yscale() == 'log'


def test_lines_join_one_shape_of_nearly_the_same_tokens(make_row):
    sizes = [(16, 4096, 768), (2, 4200, 768), (4, 16384, 768), (16, 4096, 192)]
    rows = [make_row('triton', size, 1.0 + index) for index, size in enumerate(sizes)]
    (axis,) = page.draw(rows, 1000.0, 'title').axes
    line, points, _ = axis.get_lines()
    assert line.get_label() == 'triton'
    assert line.get_xdata().tolist() == [4096, 16384]
    assert line.get_ydata() == pytest.approx([1e9 / prod(sizes[0]), 3e9 / prod(sizes[2])])
    assert (points.get_linestyle(), points.get_color()) == ('None', line.get_color())
    assert points.get_xdata().tolist() == [4096, 4200]
    assert points.get_ydata() == pytest.approx([4e9 / prod(sizes[3]), 2e9 / prod(sizes[1])])


def test_operators_on_grids_have_pages_too(make_row, make_results):
    made = make_results([make_row('copy', (16, 64, 64, 192), 1.0, name='q_shift')])
    text = page.page([('ops_x', made)])
    assert '| B | rows | columns | C | pass | copy |' in text
    assert '| 16 | 64 | 64 | 192 | fwd | 1.000 |' in text
    assert page.pictures([('ops_x', made)]).keys() == {'ops_x_q_shift_bfloat16.svg'}


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        ('{"rows": []}', 'results have header, rows and left_out'),
        ('{}', 'results have header, rows and left_out'),
        ('{broken', 'Expecting property name'),
        ('3', "'int' object is not iterable"),
    ],
)
def test_results_of_another_layout_are_refused_by_name(tmp_path, capsys, content, reason):
    file = tmp_path / 'benchmarks' / 'ops_x.json'
    file.parent.mkdir()
    file.write_text(content)
    assert page.main(['--docs', str(tmp_path)]) == 1
    assert f'page.py: {file} holds no results: {reason}' in capsys.readouterr().err
