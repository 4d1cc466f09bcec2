"""benchmarks/reliability.py: the page counts what the tests' results say; failures are named and end with exit code 2."""

from helpers import ROOT

from benchmarks import reliability

JUNIT = """<testsuites><testsuite>
<testcase file="tests/test_kill.py" name="test_killed_at_random_moments[sft]" time="9"><properties>
<property name="kills" value="20"/><property name="starts" value="31"/><property name="finished" value="11"/>
</properties></testcase>
<testcase file="tests/test_bad_inputs.py" name="test_one[a-CSV-0]" time="1"><properties>
<property name="kind" value="CSV"/><property name="stage" value="sft"/></properties></testcase>
<testcase file="tests/test_bad_inputs.py" name="test_one[b-CSV-1]" time="1"><failure/><properties>
<property name="kind" value="CSV"/><property name="stage" value="rl"/></properties></testcase>
<testcase file="tests/test_fuzz_readers.py" name="test_random_bytes[csv]" time="90"><properties>
<property name="csv" value="1200"/></properties></testcase>
<testcase file="tests/test_sft.py" name="test_two_processes_train_as_one" time="9"/>
<testcase file="tests/test_disks.py" name="test_a_full_disk[x]" time="1"><skipped/></testcase>
<testcase file="tests/test_sizes.py" name="test_a_large_catalog" time="9"><properties>
<property name="items" value="1000000"/></properties></testcase>
</testsuite></testsuites>"""


def test_the_page_counts_what_the_results_say(tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT)
    text = reliability.page(reliability.read_junit(tmp_path / "junit.xml"), "abc")
    assert "Commit abc" in text and "7 tests, 1 failed" in text
    assert "20 kills survived" in text and "| sft | 20 | 31 | 11 | passed |" in text
    assert "gives 2 bad inputs to 2 commands" in text and "| CSV | 2 | 1 |" in text
    assert "1,200 files in 1.5 minutes" in text and "| csv | 1200 |" in text
    assert "| SFT: weights | `test_two_processes_train_as_one` | passed |" in text
    assert "`tests/test_disks.py` | 0 | 0 | 1 |" in text and "catalogs of 1, 2 and 1,000,000 items" in text
    assert "## Failed\n\n- `tests/test_bad_inputs.py::test_one[b-CSV-1]`" in text


def test_every_test_of_the_page_exists():
    for test in (*reliability.TWO_PROCESSES, *reliability.OTHERS, reliability.KILL, reliability.BAD, reliability.FUZZ):
        file, _, name = test.partition("::")
        assert f"def {name or 'test_'}" in (ROOT / file).read_text()
