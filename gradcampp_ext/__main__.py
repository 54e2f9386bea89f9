"""python -m gradcampp_ext: the command line, where its script is not on the PATH."""

from gradcampp_ext.cli import main

if __name__ == "__main__":
    main()
