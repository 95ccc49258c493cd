package enginetest

import (
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestWorldServes(t *testing.T) {
	w := NewWorld(t, WorldOptions{})
	c, err := w.Pod.Dial("tcp", OutsideIP+":9000", 5*time.Second)
	require.NoError(t, err)
	defer c.Close()
	req, err := http.NewRequest("GET", "http://x/data?bytes=100000", nil)
	require.NoError(t, err)
	require.NoError(t, req.Write(c))
	b := make([]byte, 15)
	_, err = io.ReadFull(c, b)
	require.NoError(t, err)
	assert.Equal(t, "HTTP/1.1 200 OK", string(b))
}

func TestDataIsTheSame(t *testing.T) {
	a, err := io.ReadAll(Data(200000))
	require.NoError(t, err)
	assert.Len(t, a, 200000)
	assert.NotEqual(t, a[:65521], a[1:65522])
	assert.Equal(t, DataSum(200000), DataSum(200000))
	assert.NotEqual(t, DataSum(200000), DataSum(199999))
}
