"""Whether what lies in OUT is whole and sound, and what its recipe makes of its inputs."""
