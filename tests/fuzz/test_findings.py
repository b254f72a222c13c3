"""What fuzzing has found, reduced: each input runs clean now."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

import qmoecodec

#: name -> (reason, file in base64)
FOUND = {
    # An expert whose row has a codeword too many and padding that is not 0; the padding was named first (spec §9, item 10).
    "padding-after-overrun": (
        "row_overrun",
        (
            "oAMAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJxbW9lY29kZWMiOiJ7XCJkaWN0aW9uYXJpZXNcIjpbe1wiY29kZV9iaXRzXCI6MTIs"
            "XCJjcmMzMlwiOlwiNDFkOTEyZmZcIixcImtpbmRcIjpcImFpdmZcIixcInRocmVzaG9sZFwiOjN9XSxcImZvcm1hdF92ZXJzaW9u"
            "XCI6XCIxLjBcIixcImdyb3Vwc1wiOlt7XCJjb2RlX2JpdHNcIjoxMixcImR0eXBlXCI6XCJGMTZcIixcImxheW91dFwiOlwibWF0"
            "cml4XCIsXCJuYW1lXCI6XCJ3XCIsXCJyb3dfbGVuZ3RoX2Jhc2VcIjozLFwic2hhcGVcIjpbMSwxLDJdLFwic291cmNlXCI6XCJ3"
            "LndlaWdodFwifV0sXCJvcHRpb25hbF9mZWF0dXJlc1wiOltdLFwicGFzc3Rocm91Z2hcIjp7fSxcInJlcXVpcmVkX2ZlYXR1cmVz"
            "XCI6W119In0sIndfY29kZV9vZmZzZXRzIjp7ImR0eXBlIjoiVTY0Iiwic2hhcGUiOlsyXSwiZGF0YV9vZmZzZXRzIjpbMCwxNl19"
            "LCJxbW9lY29kZWMuaGVhZGVyX2NyYzMyIjp7ImR0eXBlIjoiVTMyIiwic2hhcGUiOlsxXSwiZGF0YV9vZmZzZXRzIjpbMTYsMjBd"
            "fSwid19jaGVja3N1bXMiOnsiZHR5cGUiOiJVMzIiLCJzaGFwZSI6WzFdLCJkYXRhX29mZnNldHMiOlsyMCwyNF19LCJ3X2xldmVs"
            "cyI6eyJkdHlwZSI6IkYxNiIsInNoYXBlIjpbMSwxLDJdLCJkYXRhX29mZnNldHMiOlsyNCwyOF19LCJxbW9lY29kZWMuZGljdGlv"
            "bmFyeS4wIjp7ImR0eXBlIjoiVTgiLCJzaGFwZSI6WzJdLCJkYXRhX29mZnNldHMiOlsyOCwzMF19LCJ3X2NvZGVzIjp7ImR0eXBl"
            "IjoiVTgiLCJzaGFwZSI6WzVdLCJkYXRhX29mZnNldHMiOlszMCwzNV19LCJ3X2RpY3Rpb25hcnlfaW5kZXgiOnsiZHR5cGUiOiJV"
            "OCIsInNoYXBlIjpbMV0sImRhdGFfb2Zmc2V0cyI6WzM1LDM2XX0sIndfcm93X2xlbmd0aHMiOnsiZHR5cGUiOiJVOCIsInNoYXBl"
            "IjpbMSwxXSwiZGF0YV9vZmZzZXRzIjpbMzYsMzddfX0gICAgAAAAAAAAAAAFAAAAAAAAAMSF/pt5jdaaALwAAAAAAAAAAYAAAA=="
        ),
    ),
    # The bound on an expert's digits holds, but not for the row with the unused codeword; it was applied to single rows too.
    "bound-of-one-row": (
        "unused_codeword",
        (
            "sAMAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJxbW9lY29kZWMiOiJ7XCJkaWN0aW9uYXJpZXNcIjpbe1wiY29kZV9iaXRzXCI6MTIs"
            "XCJjcmMzMlwiOlwiYjY1MjU4YWVcIixcImtpbmRcIjpcImFpdmZcIixcInRocmVzaG9sZFwiOjM4NDJ9XSxcImZvcm1hdF92ZXJz"
            "aW9uXCI6XCIxLjBcIixcImdyb3Vwc1wiOlt7XCJjb2RlX2JpdHNcIjoxMixcImR0eXBlXCI6XCJGMzJcIixcImxheW91dFwiOlwi"
            "bWF0cml4XCIsXCJuYW1lXCI6XCJ3XCIsXCJyb3dfbGVuZ3RoX2Jhc2VcIjoxLFwic2hhcGVcIjpbMSwzLDI1NF0sXCJzb3VyY2Vc"
            "IjpcIncud2VpZ2h0XCJ9XSxcIm9wdGlvbmFsX2ZlYXR1cmVzXCI6W10sXCJwYXNzdGhyb3VnaFwiOnt9LFwicmVxdWlyZWRfZmVh"
            "dHVyZXNcIjpbXX0ifSwid19jb2RlX29mZnNldHMiOnsiZHR5cGUiOiJVNjQiLCJzaGFwZSI6WzJdLCJkYXRhX29mZnNldHMiOlsw"
            "LDE2XX0sInFtb2Vjb2RlYy5oZWFkZXJfY3JjMzIiOnsiZHR5cGUiOiJVMzIiLCJzaGFwZSI6WzFdLCJkYXRhX29mZnNldHMiOlsx"
            "NiwyMF19LCJ3X2NoZWNrc3VtcyI6eyJkdHlwZSI6IlUzMiIsInNoYXBlIjpbMV0sImRhdGFfb2Zmc2V0cyI6WzIwLDI0XX0sIndf"
            "bGV2ZWxzIjp7ImR0eXBlIjoiRjMyIiwic2hhcGUiOlsxLDMsMl0sImRhdGFfb2Zmc2V0cyI6WzI0LDQ4XX0sInFtb2Vjb2RlYy5k"
            "aWN0aW9uYXJ5LjAiOnsiZHR5cGUiOiJVOCIsInNoYXBlIjpbNjVdLCJkYXRhX29mZnNldHMiOls0OCwxMTNdfSwid19jb2RlcyI6"
            "eyJkdHlwZSI6IlU4Iiwic2hhcGUiOls4XSwiZGF0YV9vZmZzZXRzIjpbMTEzLDEyMV19LCJ3X2RpY3Rpb25hcnlfaW5kZXgiOnsi"
            "ZHR5cGUiOiJVOCIsInNoYXBlIjpbMV0sImRhdGFfb2Zmc2V0cyI6WzEyMSwxMjJdfSwid19yb3dfbGVuZ3RocyI6eyJkdHlwZSI6"
            "IlU4Iiwic2hhcGUiOlsxLDNdLCJkYXRhX29mZnNldHMiOlsxMjIsMTI1XX19ICAgICAgIAAAAAAAAAAACAAAAAAAAABSZiMB/aKz"
            "7QAAAAAAAAAAAACAvwAAAAAAAAAAAACAP1VVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVVUVVVVV"
            "VVVVVVVVVVVVVVVVVQUA/w/+DwAC4P8AAAEB"
        ),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_finding(tmp_path: Path, name: str) -> None:
    reason, text = FOUND[name]
    path = tmp_path / "f.safetensors"
    path.write_bytes(base64.b64decode(text))
    assert [problem.reason for problem in qmoecodec.verify(path, deep=True).problems][:1] == [reason]
    with pytest.raises(qmoecodec.FormatError) as caught:
        qmoecodec.unpack(path, tmp_path / "out")
    assert caught.value.reason == reason
