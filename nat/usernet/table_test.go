package usernet

import (
	"reflect"
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestFlowSize(t *testing.T) {
	assert.LessOrEqual(t, int(reflect.TypeOf(flow{}).Size()), 128)
}
