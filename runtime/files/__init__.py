"""What every other folder stands on: files on disk, with the standard library and numpy alone.

atomic.py         writing files and directories: whole or not at all
checked_json.py   reading JSON that comes from outside, and taking its fields
hashes.py         SHA-256 of files, remembered for as long as a file stays
tensors.py        safetensors: headers read and checked, tensors mapped, files written
quantised.py      quantised weights as the numbers that they stand for
tensor_reader.py  tensors read into memory that is there already
parameters.py     counting parameters from names and shapes
lazy.py           names that a package hands on, imported at their first use
kinds.py          what a path is, and the command that takes it
extras.py         the sentence that names a missing extra, right for how d2m is installed
"""
