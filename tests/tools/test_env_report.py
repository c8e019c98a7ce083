import json


def test_report_prints_a_table_and_json(load_tool, capsys):
    tool = load_tool('env_report.py')
    assert tool.main([]) == 0
    table = capsys.readouterr().out
    assert tool.main(['--json']) == 0
    report = json.loads(capsys.readouterr().out)
    assert report['Packages']['torch'] in table
    assert 'bi_wkv' in report['Operators']
