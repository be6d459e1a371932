"""What is written in C++ for CPUs, one file an ability; build.py says when and how it is compiled."""
