def pytest_configure(config):
    config.addinivalue_line("markers", "slurm: brings up a Slurm on this machine (slurm-wlm, munge, root)")
