# python_package_path(RESULT distribution path): where an installed Python package keeps its files,
# found without importing it. A RESULT that is set already (-DRESULT=...) stays.
function(python_package_path result distribution path)
  if(${result})
    return()
  endif()
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "from importlib.metadata import distribution as d; print(d('${distribution}').locate_file('${path}'), end='')"
    OUTPUT_VARIABLE found ERROR_QUIET)
  if(NOT EXISTS "${found}")
    message(FATAL_ERROR
      "${Python_EXECUTABLE} has no package ${distribution} with ${path}: pip install what "
      "pyproject.toml lists under build.requires, or set ${result}.")
  endif()
  set(${result} "${found}" PARENT_SCOPE)
endfunction()
