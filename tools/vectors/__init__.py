"""Generator of the conformance vectors (conformance/manifest.json): `python tools/vectors/generate.py`.

It writes files from the specification alone, with a writer of its own, so that it can break every rule of the format
one at a time. Only the dictionaries built for given probabilities, and the published 2023 table, come from qmoecodec.
"""
