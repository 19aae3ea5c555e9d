# Fails when one of OBJECTS defines a weak symbol (nm: V, W or u).
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} -C --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCH "[^\n]* [VWu] [^\n]*" weak "${symbols}")
  if(weak)
    message(FATAL_ERROR "${object} defines a weak symbol, which the linker may keep for every CPU: ${weak}")
  endif()
endforeach()
