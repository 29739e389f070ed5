def test_import_leaves_mindspore_alone():
    import subprocess
    import sys

    code = "import mindpet, sys; print('mindspore' in sys.modules, mindpet.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"
