/* A stand-in for Intel's libhlml.so: what it says stands in the file that HLML_STUB names, which the test writes. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { OK = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, DEVICES = 4 };

/* As Stub and StubDevice of test_telemetry.py have it. */
struct device {
    unsigned long long energy_mj, memory_used, throttle_bits;
    unsigned present, module, supported, power_mw, temperature_c, utilisation_percent;
};
struct state {
    struct device devices[DEVICES];
    unsigned hang, crash;
};

static volatile struct state *state;

int hlml_init(void)
{
    int file = open(getenv("HLML_STUB"), O_RDWR);
    state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    printf("a library may print\n");
    fflush(stdout);
    return OK;
}

int hlml_device_get_handle_by_index(unsigned index, void **device)
{
    if (index >= DEVICES || !state->devices[index].present)
        return NOT_FOUND;
    *device = (void *)&state->devices[index];
    return OK;
}

int hlml_device_get_module_id(volatile struct device *device, unsigned *module)
{
    *module = device->module;
    return OK;
}

int hlml_device_get_total_energy_consumption(volatile struct device *device, unsigned long long *energy)
{
    while (state->hang)
        usleep(1000);
    if (state->crash)
        *(volatile int *)0 = 1;
    *energy = device->energy_mj;
    return device->supported ? OK : NOT_SUPPORTED;
}

int hlml_device_get_power_usage(volatile struct device *device, unsigned *power)
{
    *power = device->power_mw;
    return device->supported ? OK : NOT_SUPPORTED;
}

int hlml_device_get_temperature(volatile struct device *device, int sensor, unsigned *temperature)
{
    *temperature = sensor == 0 ? device->temperature_c : 0;
    return device->supported ? OK : NOT_SUPPORTED;
}

int hlml_device_get_utilization_rates(volatile struct device *device, unsigned *rates)
{
    rates[0] = device->utilisation_percent;
    rates[1] = 0;
    return device->supported ? OK : NOT_SUPPORTED;
}

int hlml_device_get_memory_info(volatile struct device *device, unsigned long long *memory)
{
    memory[0] = 0;
    memory[1] = device->memory_used;
    memory[2] = device->memory_used;
    return device->supported ? OK : NOT_SUPPORTED;
}

int hlml_device_get_current_clocks_throttle_reasons(volatile struct device *device, unsigned long long *reasons)
{
    *reasons = device->throttle_bits;
    return device->supported ? OK : NOT_SUPPORTED;
}
