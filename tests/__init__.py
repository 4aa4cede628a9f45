"""The tests of the project, in the folders of `src`; `whole` is for both processes together."""
