"""python -m distmerge"""

from distmerge.cli import main

main()
